"""The page of many runs: its structure, widths and texts; in a browser with --long."""

import html
import html.parser
import json
import re
import shutil
import subprocess

import matplotlib
import pytest
from matplotlib.text import Text

from moe_jax.report import figures, page, style
from tests.report import made_up

MAX_BYTES = 5_000_000
VOID = {"meta", "img", "source", "br"}


class Parsed(html.parser.HTMLParser):
    """The elements of a page with the names of those around them."""

    def __init__(self, text):
        super().__init__()
        self.elements, self._open = [], []
        self.feed(text)
        assert not self._open, "every element is closed"

    def handle_starttag(self, tag, attributes):
        around = [f"{name}.{own.get('class', '')}" for name, own in self._open]
        self.elements.append((tag, dict(attributes), around))
        if tag not in VOID:
            self._open.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def all(self, tag):
        return [(own, around) for name, own, around in self.elements if name == tag]


@pytest.fixture(scope="module")
def sweep_of_22(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    folders = made_up.write_sweep(root, arms=5, seeds=3)
    assert len(folders) == 22
    return folders


@pytest.fixture(scope="module")
def sweep_of_30(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    folders = made_up.write_sweep(root, arms=27, seeds=1)
    assert len(folders) == 30
    return folders


@pytest.fixture(scope="module")
def text(sweep_of_22, tmp_path_factory):
    kept = {"training_flops": figures.FIGURES["training_flops"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "FIGURES", kept)
        written = page.write(tmp_path_factory.mktemp("page"), sweep_of_22, ["a command"])
    return written.read_text()


def test_a_page_answers_first_and_scrolls_its_tables_alone(text):
    parsed = Parsed(text)
    tags = [name for name, *_ in parsed.elements]
    assert tags.index("li") < tags.index("table") < tags.index("img")
    assert all("div.scroll" in around for _, around in parsed.all("table"))
    assert all(head not in text for head in ("http://", "https://", "<link", "@import"))
    [image] = parsed.all("img")
    assert re.search(r"naive 1\.6e\+12, with its parents 4\.5e\+12", image[0]["alt"])
    samples = [around for own, around in parsed.all("td") if own.get("class") == "text"]
    assert samples and all("details." in around for around in samples)
    assert "<th>seq_rep_4</th><th>distinct_2</th>" in text and text.count(">0.92</td>") == 22
    css = text[text.index("<style>") : text.index("</style>")]
    sizes = [16 * float(size) for size in re.findall(r"font-size: ([\d.]+)rem", css)]
    assert min(sizes) >= 9 and ".scroll { overflow-x: auto; }" in css
    for width in re.findall(r"(?<!max-)width: ([\d.]+)(rem|px)", css):
        assert float(width[0]) * (16 if width[1] == "rem" else 1) < 400


def test_the_answer_has_seeds_intervals_and_a_best_run_only_if_it_is_proven(text):
    first = html.unescape(re.search(r"<li>(.*?)</li>", text)[1])
    assert re.fullmatch(
        r"naive −0\.\d{3} bits/byte against \S+ \[−0\.\d{3}, \S+\]: [a-z ]+, n = 3 seeds\.", first
    )
    assert 'class="best"' not in text  # the second is within noise
    assert "Student&#x27;s t" in text and "commit 0123abc" in text and "a command" in text
    assert text.count("python scripts/train.py --workdir=") == 22
    heads = re.findall(r"<th>(.*?)</th>", text)
    assert {"against parent", "against dense continued", "device hours with parents"} <= set(heads)


# All but the figure of pairs of answers, which these runs have not: test_preference_figures.py.
FIGURES = tuple(name for name in figures.FIGURES if name != "preferences")


def drawn(folders, names=FIGURES):
    records = page.records_of(folders)
    with matplotlib.rc_context(style.STYLE):
        for name in names:
            row = figures.FIGURES[name]
            for layout in (style.WIDE, style.NARROW):
                yield name, layout, row.draw(records, layout)


@pytest.mark.parametrize(
    ("many", "names"), [("sweep_of_22", FIGURES), ("sweep_of_30", ("languages",))]
)
def test_figures_have_texts_that_can_be_read_at_both_widths(many, names, request):
    """368 pixels are the width of a page of 400 without its margins."""
    for name, layout, figure in drawn(request.getfixturevalue(many), names):
        pixels = (1160 if layout is style.WIDE else 368) / layout.width
        sizes = [text.get_fontsize() for text in figure.findobj(Text) if text.get_text()]
        assert min(sizes) / 72 * pixels >= 9, name
        assert figure.get_figwidth() == layout.width
        for legend in figure.legends:
            assert len(legend.get_texts()) <= 8, name


@pytest.mark.parametrize("names", [["naive_s1"], ["naive_s1", "drop_0.5_s1", "noise_s1"]])
def test_labels_are_no_longer_than_their_axes_and_inside_of_the_figure(names, sweep_of_22):
    for name, _, figure in drawn({name: sweep_of_22[name] for name in names}):
        figure.draw_without_rendering()
        labels = [label for axes in figure.axes for label in (axes.xaxis.label, axes.yaxis.label)]
        for label in filter(Text.get_text, [*figure.texts, *labels]):
            box = label.get_window_extent()
            inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1
            assert inside and box.y1 <= figure.bbox.y1, (name, label.get_text())
        for axes in figure.axes:
            label = axes.yaxis.label
            height = label.get_window_extent().height
            assert height <= axes.bbox.height + 1, (name, label.get_text())


def test_results_in_words_are_of_the_numbers(sweep_of_22):
    records = page.records_of(sweep_of_22)
    texts = {name: figures.FIGURES[name].result(records) for name in FIGURES}
    best = min(records, key=lambda record: record.result["bits_per_byte"])
    assert all(re.search(r"\d", text) for text in texts.values())
    mean = sum(r.result["bits_per_byte"] for r in records if r.name.startswith("naive")) / 3
    assert f"naive {mean:.3f}" in texts["loss"] and best.name.startswith("naive")
    first = next(record for record in records if record.is_sparse)
    load = [100 * x for row in first.result["tokens_per_expert"] for x in row]
    assert f"scratch {min(load):.1f} to {max(load):.1f} %" in texts["expert_load"]
    assert "naive 1.000 at the start, 0.850 at the end" in texts["parent_similarity"]


@pytest.mark.parametrize("names", [["dense"], ["naive_s1"], ["scratch_s1", "scratch_s2"]])
def test_dense_runs_single_runs_and_runs_without_parents_have_a_page(names, sweep_of_22, tmp_path):
    folders = {name: sweep_of_22[name] for name in names}
    for name, _, figure in drawn(folders):
        without_parent = name == "parent_similarity" and "naive_s1" not in names
        assert figure is not None or names == ["dense"] or without_parent, name
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "FIGURES", {})
        parsed = Parsed(page.write(tmp_path, folders, []).read_text())
    assert len(parsed.all("li")) == 1 and parsed.all("table")


def test_a_run_whose_loss_is_missing_is_shown_without(sweep_of_22, tmp_path):
    folder = shutil.copytree(sweep_of_22["naive_s1"], tmp_path / "lost")
    result = json.loads((folder / "result.json").read_text())
    lost = {"loss": None, "bits_per_byte": None, "per_language": {}}
    (folder / "result.json").write_text(json.dumps(result | lost))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows[len(rows) // 2 :]:
        row |= {"loss": None} if "loss" in row else {}
        if "validation" in row:
            row["validation"] |= lost
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folders = {"dense": sweep_of_22["dense"], "lost": folder}
    assert {name for name, _, figure in drawn(folders) if figure is None} == {"languages"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "FIGURES", {"loss": figures.FIGURES["loss"]})
        text = page.write(tmp_path / "out", folders, []).read_text()
    assert "lost has no held-out loss." in text and ">—</td>" in text


MEASURE = """<!doctype html><meta charset="utf-8"><body><pre id="found"></pre>
<iframe id="page" style="width:{width}px;height:900px;border:0" srcdoc="{page}"></iframe>
<script>
page.onload = () => {{
  const d = page.contentDocument, all = [...d.querySelectorAll("body *")];
  const texts = all.filter(e => e.offsetParent && e.textContent.trim());
  d.querySelector("table.sortable th:nth-child(2)").click();
  found.textContent = JSON.stringify({{
    beyond: d.documentElement.scrollWidth - d.documentElement.clientWidth,
    smallest: Math.min(...texts.map(e => parseFloat(d.defaultView.getComputedStyle(e).fontSize))),
    broken: [...d.images].filter(i => !i.naturalWidth).length,
    images: d.images.length,
    sorted: [...d.querySelectorAll("table.sortable")[0].tBodies[0].rows].map(
      row => row.cells[1].dataset.value),
  }});
}};
</script></body>"""


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium (apt install chromium)")
@pytest.mark.parametrize("many", ["sweep_of_22", "sweep_of_30"])
def test_a_browser_shows_the_page_at_both_widths(many, request, tmp_path):
    written = page.write(tmp_path, request.getfixturevalue(many), [])
    assert written.stat().st_size < MAX_BYTES
    for width in (1280, 400):
        host = tmp_path / f"{width}.html"
        inside = html.escape(written.read_text())
        host.write_text(MEASURE.format(width=width, page=inside))
        how = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr")
        command = ["chromium", *how, "--virtual-time-budget=9000", "--dump-dom", f"file://{host}"]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert "CONSOLE" not in shown.stderr
        found = json.loads(html.unescape(re.search(r'id="found">(.*?)</pre>', shown.stdout)[1]))
        assert found["beyond"] == 0 and found["smallest"] >= 9
        assert found["broken"] == 0 and found["images"] == len(figures.FIGURES)
        losses = [float(value) for value in found["sorted"]]
        assert losses == sorted(losses)


def test_a_score_is_drawn_below_the_loss(sweep_of_22):
    records = page.records_of({"naive_s1": sweep_of_22["naive_s1"]})
    rows = [{"step": s, "tokens": 1024 * s} for s in (20, 240)]
    for row, mean in zip(rows, (0.25, 0.5), strict=True):
        row["multiple_choice"] = {"n": 8, "accuracy": mean, "accuracy_interval": None}
    records[0].rows.extend(rows)
    axes = figures.loss_against_flops(records).axes
    assert [panel.get_ylabel() for panel in axes[2:]] == ["accuracy"] * 2
    assert [list(panel.lines[0].get_ydata()) for panel in axes[2:]] == [[0.25, 0.5]] * 2


def test_parents_of_other_runs_do_not_stretch_the_scale_of_the_losses(tmp_path):
    """Branches that forget most of the text end far above the mixture of them."""
    kept = {"source": "runs/dense"}
    folders = {"dense": made_up.write_run(tmp_path / "dense", seed=0, start=6.0, end=3.4)}
    for seed, name in enumerate(("some", "others"), start=1):
        folders[name] = made_up.write_run(tmp_path / name, seed=seed, start=3.4, end=9.0, **kept)
    mixed = {"source": "runs/some,runs/others", "seed": 3, "num_experts": 8}
    folders["mixed"] = made_up.write_run(tmp_path / "mixed", start=4.0, end=3.0, **mixed)
    right = figures.loss(page.records_of(folders)).axes[1]
    assert right.get_ylim()[1] < 5
