"""Tokenizer folders drawn at random: which file names which token, and where each has its id.

A folder is drawn from a seed and built from a few words, so that no file of it is stored. What
Transformers makes of each is recorded in tests/golden/tokenizers.json by `record`.
"""

import json
import pathlib
import random
import tempfile

import tokenizers as hf_tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "tokenizers.json"
MERGES = (
    "h e,l l,he ll,hell o,_ w,o r,_w or,_wor l,_worl d,_ hello,u s,e r,us er,t o,to o,too l,_ _"
)
LETTERS = "_abcdefhiklmnorstuwxyz.,<>|/"
FALLBACK = [f"<0x{byte:02X}>" for byte in range(256)]
CORE = ("<unk>", "<s>", "</s>")
OTHERS = ("<|im_start|>", "<|im_end|>", "<tool>", "[PAD]", "<|endoftext|>")
KINDS = ("bytes", "bytes", "unigram", "bpe", "pieces", "pieces", "pieces")
MODEL_TYPES = {
    "bpe": ("llama", "mistral"),
    "bytes": ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gpt2", "nemotron"),
    "unigram": ("llama", "mixtral", "lola_v1"),
    "pieces": ("llama", "llama", "mistral", "mixtral", "nemotron"),
}
CLASSES = {
    "bpe": ("PreTrainedTokenizerFast", "LlamaTokenizer"),
    "bytes": ("PreTrainedTokenizerFast", "Qwen2Tokenizer", "GPT2Tokenizer", "LlamaTokenizerFast"),
    "unigram": ("PreTrainedTokenizerFast",),
    "pieces": ("PreTrainedTokenizerFast", "LlamaTokenizer", "LlamaTokenizerFast"),
}
PROMPTS = (
    "hello world",
    " hello  world . it 's ",
    "<|im_start|>user\nhello <|im_end|> world",
    "a</s>b<s> hello",
    "x <tool>y [PAD] z<|endoftext|>",
    "é\U0001f600",
)


def draw(seed: int) -> dict:
    """The kind of the folder's vocabulary, the tokens that it holds, and its other files."""
    chance = random.Random(seed)
    kind = chance.choice(KINDS)
    inside = [token for token in OTHERS if chance.random() < 0.4]  # in the vocabulary
    outside = [token for token in OTHERS if token not in inside and chance.random() < 0.5]
    tokens, size = [*CORE, *inside, *outside], vocabulary_size(kind, inside)
    added = {token: size + i for i, token in enumerate(outside)}
    if kind == "pieces" and not chance.randrange(3):
        added = {token: number + 5 for token, number in added.items()}  # a hole before them
    files = {}
    if chance.random() < 0.8:
        files["tokenizer_config.json"] = _settings(chance, kind, tokens, added)
    listed = "added_tokens_decoder" in files.get("tokenizer_config.json", {})
    if added and chance.random() < (0.5 if listed else 0.8):
        files["added_tokens.json"] = added
    if chance.random() < 0.4:
        files["special_tokens_map.json"] = _names(chance, tokens, marked=False)
    llama = "LlamaTokenizer" in files.get("tokenizer_config.json", {}).get("tokenizer_class", "")
    rows = size + len(added) + 8  # a padded vocabulary
    config = {"model_type": chance.choice(MODEL_TYPES[kind]), "vocab_size": rows}
    files["config.json"] = config | _ends(chance, rows)
    if chance.random() < 0.6:
        files["generation_config.json"] = {"bos_token_id": 1} | _ends(chance, rows)
    return {
        "kind": kind,
        "inside": inside,
        "added": outside[: chance.randrange(len(outside) + 1)],  # in a tokenizer.json
        "prefix": bool(chance.randrange(2)),
        "trim": bool(chance.randrange(2)),
        "user_defined": chance.randrange(3) == 0,
        "byte_fallback": chance.randrange(4) > 0,
        "model": chance.choice(("bpe", "bpe", "unigram")) if not llama else "bpe",
        "template": chance.choice(("", "<s> $A", "<s> $A </s>")),
        "files": files,
        "decoded": [[chance.randrange(rows) for _ in range(12)] for _ in range(2)],
    }


def _settings(chance: random.Random, kind: str, tokens: list[str], added: dict[str, int]) -> dict:
    """A tokenizer_config.json."""
    settings = _names(chance, tokens, marked=True)
    classes = CLASSES[kind]
    settings |= {"tokenizer_class": chance.choice(classes)} if chance.random() < 0.8 else {}
    for key in ("add_bos_token", "add_eos_token", "legacy"):
        settings |= {key: bool(chance.randrange(2))} if chance.random() < 0.6 else {}
    rare = ("split_special_tokens", "clean_up_tokenization_spaces")
    for key in (*rare, "add_prefix_space") if kind == "pieces" else rare:
        settings |= {key: bool(chance.randrange(2))} if chance.random() < 0.1 else {}
    if chance.random() < 0.1:
        settings["image_token"] = chance.choice(tokens)
    if chance.random() < 0.1:
        settings["extra_special_tokens"] = chance.choice(([tokens[-1]], {"x_token": tokens[-1]}))
    if added and chance.random() < 0.5:
        in_json = enumerate(tokens[: -len(added)]) if kind != "pieces" else ()
        settings["added_tokens_decoder"] = {
            str(number): _written(token, marked=False, chance=chance if kind == "pieces" else None)
            for token, number in [*((t, i) for i, t in in_json), *added.items()]
        }
    return settings


def _names(chance: random.Random, tokens: list[str], *, marked: bool) -> dict:
    """Names of tokens as a tokenizer_config.json or a special_tokens_map.json writes them."""
    names: dict = {}
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = chance.choice(tokens if key != "unk_token" else CORE[:1])
        shapes = (token, token, _written(token, marked=marked), None)
        if chance.random() < 0.6:
            names[key] = chance.choice(shapes[: 3 + (key != "unk_token")])
    if chance.random() < 0.3:
        names["additional_special_tokens"] = chance.sample(tokens[3:], min(2, len(tokens) - 3))
    return names


def _written(token: str, *, marked: bool, chance: random.Random | None = None) -> dict:
    """A token with its flags; `marked` as a tokenizer_config.json writes it outside a list."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    if not marked:
        flags["special"] = True
    if chance is not None:
        flags |= {flag: chance.random() < 0.2 for flag in flags}
    return ({"__type": "AddedToken"} if marked else {}) | {"content": token, **flags}


def _ends(chance: random.Random, rows: int) -> dict:
    one, more = chance.randrange(rows), [chance.randrange(rows) for _ in range(3)]
    value = chance.choice((one, more, None, ...))
    return {} if value is ... else {"eos_token_id": value}


def _merges(space: str) -> list[tuple[str, str]]:
    return [tuple(merge.replace("_", space).split()) for merge in MERGES.split(",")]


def vocabulary_size(kind: str, inside: list[str]) -> int:
    if kind == "bytes":
        return 3 + len(inside) + 256 + len(_merges("_"))
    return 3 + len(inside) + 256 + len(_merges("_")) + len(LETTERS)


def build(folder: pathlib.Path, drawn: dict) -> pathlib.Path:
    """Writes the folder; returns the path of its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in drawn["files"].items():
        (folder / name).write_text(json.dumps(values))
    if drawn["kind"] == "pieces":
        path = folder / "tokenizer.model"
        path.write_bytes(_sentencepiece(drawn))
        return path
    path = folder / "tokenizer.json"
    made = {"bytes": _byte_level, "unigram": _unigram, "bpe": _bpe}[drawn["kind"]](drawn)
    tokens = (*CORE, *drawn["inside"], *drawn["added"])
    made.add_tokens([hf_tokenizers.AddedToken(token, special=True) for token in tokens])
    if drawn["template"]:
        made.post_processor = processors.TemplateProcessing(
            single=drawn["template"], special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    made.save(str(path))
    return path


def _pieces(drawn: dict, space: str) -> list[str]:
    merged = ["".join(pair) for pair in _merges(space)]
    return [*merged, *LETTERS.replace("_", space)]


def _byte_level(drawn: dict) -> hf_tokenizers.Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _merges("Ġ")
    pieces = [*CORE, *drawn["inside"], *letters, *map("".join, merges)]
    made = hf_tokenizers.Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def _bpe(drawn: dict) -> hf_tokenizers.Tokenizer:
    """A tokenizer.json as Transformers 4 wrote it for LlamaTokenizer."""
    pieces = [*CORE, *drawn["inside"], *FALLBACK, *_pieces(drawn, "▁")]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    rules = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    made = hf_tokenizers.Tokenizer(models.BPE(vocabulary, _merges("▁"), **rules))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return made


def _unigram(drawn: dict) -> hf_tokenizers.Tokenizer:
    pieces = [*CORE, *drawn["inside"], *FALLBACK, *_pieces(drawn, "▁")]
    scored = [(piece, 0.0 if piece in CORE else -float(i)) for i, piece in enumerate(pieces)]
    made = hf_tokenizers.Tokenizer(models.Unigram(scored, unk_id=0, byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return made


def _sentencepiece(drawn: dict) -> bytes:
    proto = sentencepiece_model_pb2.ModelProto()
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    of = dict.fromkeys([*CORE[1:], *drawn["inside"]], kinds.CONTROL) | {"<unk>": kinds.UNKNOWN}
    of |= dict.fromkeys(FALLBACK, kinds.BYTE if drawn["byte_fallback"] else kinds.NORMAL)
    if drawn["user_defined"]:
        of |= dict.fromkeys([*drawn["inside"], "▁too"], kinds.USER_DEFINED)
    for i, piece in enumerate([*CORE, *drawn["inside"], *FALLBACK, *_pieces(drawn, "▁")]):
        proto.pieces.add(piece=piece, score=-float(i), type=of.get(piece, kinds.NORMAL))
    spec, rules = proto.trainer_spec, proto.normalizer_spec
    types = {
        "bpe": sentencepiece_model_pb2.TrainerSpec.BPE,
        "unigram": sentencepiece_model_pb2.TrainerSpec.UNIGRAM,
    }
    spec.model_type, spec.byte_fallback = types[drawn["model"]], drawn["byte_fallback"]
    spec.unk_id, spec.bos_id, spec.eos_id, spec.pad_id = 0, 1, 2, -1
    spec.vocab_size = len(proto.pieces)
    rules.name, rules.add_dummy_prefix, rules.escape_whitespaces = "identity", drawn["prefix"], True
    rules.remove_extra_whitespaces = drawn["trim"]
    return proto.SerializeToString()


def of_transformers(folder: pathlib.Path, drawn: dict) -> dict:
    """What Transformers makes of a folder: its ends, and the ids and texts of the prompts."""
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    try:
        generation = transformers.GenerationConfig.from_pretrained(folder)
    except OSError:  # as a model's from_pretrained does
        generation = transformers.GenerationConfig.from_pretrained(
            folder, config_file_name="config.json", _from_model_config=True
        )
    ends, prompts = generation.eos_token_id, [theirs(prompt)["input_ids"] for prompt in PROMPTS]
    return {
        "bos": theirs.bos_token_id,
        "eos": theirs.eos_token_id,
        "ends": [] if ends is None else ends if isinstance(ends, list) else [ends],
        "prompts": prompts,
        "texts": [
            theirs.decode(ids, skip_special_tokens=True) for ids in (*prompts, *drawn["decoded"])
        ],
    }


def record(number: int) -> None:
    """Writes the goldens: `python -m tests.data.tokenizer_folders`."""
    rows = []
    for seed in range(number):
        with tempfile.TemporaryDirectory() as folder:
            drawn = draw(seed)
            build(pathlib.Path(folder), drawn)
            rows.append(json.dumps(of_transformers(pathlib.Path(folder), drawn)))
    GOLDEN.write_text("[\n" + ",\n".join(rows) + "\n]\n")


if __name__ == "__main__":
    record(80)
