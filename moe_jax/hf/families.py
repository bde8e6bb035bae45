"""Name tables: which tensor of a Hugging Face file is which leaf of our parameter tree.

Axes are written as in "(N H) D -> D N H": the tensor's, those in brackets fused into one, then
ours. A digit is a number of equal parts of which a leaf is one: GPT-2's q, k and v lie side by side
in "D (3 N H)".
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a leaf of one layer lies. `name` has {layer} and, with a tensor each, {expert}."""

    name: str
    axes: str
    part: int = 0  # of a fused tensor


Table = dict[str, Entry]  # path of a leaf, without "blocks/<slot>/"


@dataclasses.dataclass(frozen=True)
class Family:
    """The tensors of one `model_type`: the layout that is written, and others that are read."""

    architecture: str
    table: Table
    read_only: tuple[Table, ...] = ()


def _below(prefix: str, **names: tuple) -> Table:
    """Entries whose tensors lie below `prefix`, their paths written with "__" for "/"."""
    return {
        path.replace("__", "/"): Entry(prefix + name, *rest)
        for path, (name, *rest) in names.items()
    }


_LAYER = "model.layers.{layer}."

_LLAMA = {
    **_below(
        "model.",
        embed__tokens=("embed_tokens.weight", "V D -> V D"),
        final_norm__scale=("norm.weight", "D -> D"),
        final_norm__bias=("norm.bias", "D -> D"),
    ),
    "unembed": Entry("lm_head.weight", "V D -> D V"),
    **_below(
        _LAYER,
        attention__norm__scale=("input_layernorm.weight", "D -> D"),
        attention__norm__bias=("input_layernorm.bias", "D -> D"),
        mlp__norm__scale=("post_attention_layernorm.weight", "D -> D"),
        mlp__norm__bias=("post_attention_layernorm.bias", "D -> D"),
        moe__norm__scale=("post_attention_layernorm.weight", "D -> D"),
    ),
    **_below(
        _LAYER + "self_attn.",
        attention__wq=("q_proj.weight", "(N H) D -> D N H"),
        attention__wk=("k_proj.weight", "(K H) D -> D K H"),
        attention__wv=("v_proj.weight", "(K H) D -> D K H"),
        attention__wo=("o_proj.weight", "D (N H) -> N H D"),
        attention__bq=("q_proj.bias", "(N H) -> N H"),
        attention__bk=("k_proj.bias", "(K H) -> K H"),
        attention__bv=("v_proj.bias", "(K H) -> K H"),
        attention__bo=("o_proj.bias", "D -> D"),
    ),
    **_below(
        _LAYER + "mlp.",
        mlp__gate=("gate_proj.weight", "F D -> D F"),
        mlp__up=("up_proj.weight", "F D -> D F"),
        mlp__down=("down_proj.weight", "D F -> F D"),
        mlp__gate_bias=("gate_proj.bias", "F -> F"),
        mlp__up_bias=("up_proj.bias", "F -> F"),
        mlp__down_bias=("down_proj.bias", "D -> D"),
    ),
}

_NORM_OF_HEAD = _below(
    _LAYER + "self_attn.",
    attention__q_norm__scale=("q_norm.weight", "H -> H"),
    attention__k_norm__scale=("k_norm.weight", "H -> H"),
)
_NORM_OF_ALL_HEADS = _below(
    _LAYER + "self_attn.",
    attention__q_norm__scale=("q_norm.weight", "(N H) -> N H"),
    attention__k_norm__scale=("k_norm.weight", "(K H) -> K H"),
)


def _experts(block: str, gate: str, up: str, down: str) -> Table:
    """A router, and a tensor for each matrix of each expert."""
    return _below(
        f"{_LAYER}{block}.",
        moe__router__kernel=("gate.weight", "E D -> D E"),
        moe__experts__gate=(f"experts.{{expert}}.{gate}.weight", "F D -> D F"),
        moe__experts__up=(f"experts.{{expert}}.{up}.weight", "F D -> D F"),
        moe__experts__down=(f"experts.{{expert}}.{down}.weight", "D F -> F D"),
    )


_MIXTRAL = {**_LLAMA, **_experts("block_sparse_moe", "w1", "w3", "w2")}
_NAMED_EXPERTS = _experts("mlp", "gate_proj", "up_proj", "down_proj")
_OLMOE = {**_LLAMA, **_NORM_OF_ALL_HEADS, **_NAMED_EXPERTS}
_QWEN3 = {**_LLAMA, **_NORM_OF_HEAD}
_QWEN3_MOE = {**_QWEN3, **_NAMED_EXPERTS}

# As Transformers 5 holds them in memory, and writes them when told not to go back.
_STACKED = _below(
    _LAYER + "mlp.",
    moe__router__kernel=("gate.weight", "E D -> D E"),
    moe__experts__gate=("experts.gate_up_proj", "E (2 F) D -> E D F", 0),
    moe__experts__up=("experts.gate_up_proj", "E (2 F) D -> E D F", 1),
    moe__experts__down=("experts.down_proj", "E D F -> E F D"),
)
# The layout of the Skywork group's own code for MoE models.
_SKYWORK_REMOTE = _below(
    _LAYER + "mlp.moe.",
    moe__router__kernel=("gate.wg.weight", "E D -> D E"),
    moe__experts__gate=("experts.experts.{expert}.up_proj.weight", "(2 F) D -> D F", 0),
    moe__experts__up=("experts.experts.{expert}.up_proj.weight", "(2 F) D -> D F", 1),
    moe__experts__down=("experts.experts.{expert}.down_proj.weight", "D F -> F D"),
)


def _gpt2(prefix: str) -> Table:
    """Matrices are [in, out] here, but the router's of LOLA."""
    return {
        **_below(
            prefix,
            embed__tokens=("wte.weight", "V D -> V D"),
            embed__positions=("wpe.weight", "T D -> T D"),
            final_norm__scale=("ln_f.weight", "D -> D"),
            final_norm__bias=("ln_f.bias", "D -> D"),
        ),
        "unembed": Entry("lm_head.weight", "V D -> D V"),
        **_below(
            prefix + "h.{layer}.",
            attention__norm__scale=("ln_1.weight", "D -> D"),
            attention__norm__bias=("ln_1.bias", "D -> D"),
            **{
                f"attention__w{n}": ("attn.c_attn.weight", "D (3 N H) -> D N H", i)
                for i, n in enumerate("qkv")
            },
            **{
                f"attention__b{n}": ("attn.c_attn.bias", "(3 N H) -> N H", i)
                for i, n in enumerate("qkv")
            },
            attention__wo=("attn.c_proj.weight", "(N H) D -> N H D"),
            attention__bo=("attn.c_proj.bias", "D -> D"),
            **{
                f"{block}__norm__{name}": (f"ln_2.{tensor}", "D -> D")
                for block in ("mlp", "moe")
                for name, tensor in (("scale", "weight"), ("bias", "bias"))
            },
            mlp__up=("mlp.c_fc.weight", "D F -> D F"),
            mlp__up_bias=("mlp.c_fc.bias", "F -> F"),
            mlp__down=("mlp.c_proj.weight", "F D -> F D"),
            mlp__down_bias=("mlp.c_proj.bias", "D -> D"),
        ),
    }


_LOLA = _below(
    "transformer.h.{layer}.moe.",
    moe__router__kernel=("gate.weight", "E D -> D E"),
    moe__experts__up=("experts.{expert}.c_fc.weight", "D F -> D F"),
    moe__experts__up_bias=("experts.{expert}.c_fc.bias", "F -> F"),
    moe__experts__down=("experts.{expert}.c_proj.weight", "F D -> F D"),
    moe__experts__down_bias=("experts.{expert}.c_proj.bias", "D -> D"),
)

# By `model_type`. Where several can hold a model, the first is what it is saved as.
FAMILIES = {
    "llama": Family("LlamaForCausalLM", _LLAMA),
    "mistral": Family("MistralForCausalLM", _LLAMA),
    "qwen2": Family("Qwen2ForCausalLM", _LLAMA),
    "qwen3": Family("Qwen3ForCausalLM", _QWEN3),
    "nemotron": Family("NemotronForCausalLM", _LLAMA),
    "gpt2": Family("GPT2LMHeadModel", _gpt2("transformer."), (_gpt2(""),)),
    "mixtral": Family("MixtralForCausalLM", _MIXTRAL, ({**_MIXTRAL, **_STACKED},)),
    "olmoe": Family("OlmoeForCausalLM", _OLMOE, ({**_OLMOE, **_STACKED},)),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", _QWEN3_MOE, ({**_QWEN3_MOE, **_STACKED},)),
    "lola_v1": Family("LOLALMHeadModel", {**_gpt2("transformer."), **_LOLA}),
    "skywork": Family("SkyworkForCausalLM", _MIXTRAL, ({**_MIXTRAL, **_SKYWORK_REMOTE},)),
}

# Constants that some files carry along.
IGNORED = r"(rotary_emb\.inv_freq|(^|\.)h\.\d+\.attn\.(bias|masked_bias))$"
