"""What the pages tell a reader to type: README, docs/ and the other pages at the top."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")])
# A changelog names commands; all others give them to be typed.
WITH_COMMANDS = [page for page in PAGES if page.name != "CHANGELOG.md"]
BLOCK = r"^```(?P<language>\w*)\n(?P<block>.*?)^```"
PROGRAMS = "python|bash|sbatch|pip|git|tensorboard|moe_jax"
SENTENCE = rf"`(?P<command>(?:[A-Z_]+=\S+ )?(?:{PROGRAMS}) [^`\n…]+)`"


def blocks(page: pathlib.Path, language: str) -> list[str]:
    found = re.finditer(BLOCK, page.read_text(), re.MULTILINE | re.DOTALL)
    return [match["block"] for match in found if match["language"] == language]


def commands(page: pathlib.Path) -> list[tuple[str, str]]:
    """(language, text) of each shell command, in blocks and sentences, and each block of Python."""
    found = []
    both = re.compile(f"{BLOCK}|{SENTENCE}", re.MULTILINE | re.DOTALL)
    for match in both.finditer(page.read_text()):
        if match["command"]:
            found.append(("bash", match["command"]))
        elif match["language"] == "python":
            found.append(("python", match["block"]))
        elif match["language"] == "bash":
            lines = match["block"].replace("\\\n", " ").splitlines()
            lines = (" ".join(line.partition("  #")[0].split()) for line in lines)
            found += [("bash", line) for line in lines if line and not line.startswith("#")]
    return found
