"""Name tables that map the tensors of Hugging Face files to the leaves of our parameter tree.

A line has a leaf's path, the tensor's name, and the axes, first the tensor's and then ours. Axes in
brackets are fused into one. A digit among them is a number of equal parts, one of which is the
leaf, and the line ends with the index of that part: GPT-2 fuses q, k and v in "D (3 N H)".
"""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Entry:
    """The tensor of a leaf; `name` contains {layer}, and {expert} if each expert has a tensor."""

    name: str
    axes: str
    part: int = 0  # the index among the parts of a fused tensor


Table = dict[str, Entry]  # path of a leaf, without "blocks/<slot>/"


@dataclasses.dataclass(frozen=True)
class Family:
    """The tensors of one `model_type`; `read_only` are layouts never written."""

    architecture: str
    table: Table
    read_only: tuple[Table, ...] = ()

    @property
    def prefix(self) -> str:
        """The prefix of all names except the head's: "model." or "transformer."."""
        return self.table["embed/tokens"].name.partition(".")[0] + "."

    def without_prefix(self) -> tuple[Table, ...]:
        """The tables for a file saved without the head, such as GPT-2's on the Hub."""
        return tuple(
            {
                path: dataclasses.replace(entry, name=entry.name.removeprefix(self.prefix))
                for path, entry in table.items()
            }
            for table in (self.table, *self.read_only)
        )


def _table(text: str) -> Table:
    """Parses a table: columns are separated by two or more spaces, and a name that begins with a
    dot belongs to a layer."""
    lines = (re.split("  +", line.strip()) for line in text.strip().splitlines())
    return {
        path: Entry(re.sub(r"^\.", "model.layers.{layer}.", name), axes, *map(int, part))
        for path, name, axes, *part in lines
    }


_LLAMA = _table("""
    embed/tokens          model.embed_tokens.weight         V D -> V D
    final_norm/scale      model.norm.weight                 D -> D
    final_norm/bias       model.norm.bias                   D -> D
    unembed               lm_head.weight                    V D -> D V
    attention/norm/scale  .input_layernorm.weight           D -> D
    attention/norm/bias   .input_layernorm.bias             D -> D
    attention/wq          .self_attn.q_proj.weight          (N H) D -> D N H
    attention/wk          .self_attn.k_proj.weight          (K H) D -> D K H
    attention/wv          .self_attn.v_proj.weight          (K H) D -> D K H
    attention/wo          .self_attn.o_proj.weight          D (N H) -> N H D
    attention/bq          .self_attn.q_proj.bias            (N H) -> N H
    attention/bk          .self_attn.k_proj.bias            (K H) -> K H
    attention/bv          .self_attn.v_proj.bias            (K H) -> K H
    attention/bo          .self_attn.o_proj.bias            D -> D
    mlp/norm/scale        .post_attention_layernorm.weight  D -> D
    mlp/norm/bias         .post_attention_layernorm.bias    D -> D
    mlp/gate              .mlp.gate_proj.weight             F D -> D F
    mlp/up                .mlp.up_proj.weight               F D -> D F
    mlp/down              .mlp.down_proj.weight             D F -> F D
    mlp/gate_bias         .mlp.gate_proj.bias               F -> F
    mlp/up_bias           .mlp.up_proj.bias                 F -> F
    mlp/down_bias         .mlp.down_proj.bias               D -> D
    moe/norm/scale        .post_attention_layernorm.weight  D -> D
""")
_NORM_OF_HEAD = _table("""
    attention/q_norm/scale  .self_attn.q_norm.weight  H -> H
    attention/k_norm/scale  .self_attn.k_norm.weight  H -> H
""")
_NORM_OF_ALL_HEADS = _table("""
    attention/q_norm/scale  .self_attn.q_norm.weight  (N H) -> N H
    attention/k_norm/scale  .self_attn.k_norm.weight  (K H) -> K H
""")
_MIXTRAL = _LLAMA | _table("""
    moe/router/kernel  .block_sparse_moe.gate.weight                 E D -> D E
    moe/experts/gate   .block_sparse_moe.experts.{expert}.w1.weight  F D -> D F
    moe/experts/up     .block_sparse_moe.experts.{expert}.w3.weight  F D -> D F
    moe/experts/down   .block_sparse_moe.experts.{expert}.w2.weight  D F -> F D
""")
_NAMED_EXPERTS = _table("""
    moe/router/kernel  .mlp.gate.weight                        E D -> D E
    moe/experts/gate   .mlp.experts.{expert}.gate_proj.weight  F D -> D F
    moe/experts/up     .mlp.experts.{expert}.up_proj.weight    F D -> D F
    moe/experts/down   .mlp.experts.{expert}.down_proj.weight  D F -> F D
""")
# Transformers 5 stacks the experts in memory, and in files if told not to convert back.
_STACKED = _table("""
    moe/router/kernel  .mlp.gate.weight           E D -> D E
    moe/experts/gate   .mlp.experts.gate_up_proj  E (2 F) D -> E D F  0
    moe/experts/up     .mlp.experts.gate_up_proj  E (2 F) D -> E D F  1
    moe/experts/down   .mlp.experts.down_proj     E D F -> E F D
""")
# The layout of the Skywork group's own MoE code.
_SKYWORK_REMOTE = _table("""
    moe/router/kernel  .mlp.moe.gate.wg.weight                             E D -> D E
    moe/experts/gate   .mlp.moe.experts.experts.{expert}.up_proj.weight    (2 F) D -> D F  0
    moe/experts/up     .mlp.moe.experts.experts.{expert}.up_proj.weight    (2 F) D -> D F  1
    moe/experts/down   .mlp.moe.experts.experts.{expert}.down_proj.weight  D F -> F D
""")
_OLMOE = _LLAMA | _NORM_OF_ALL_HEADS | _NAMED_EXPERTS
_QWEN3 = _LLAMA | _NORM_OF_HEAD
_QWEN3_MOE = _QWEN3 | _NAMED_EXPERTS

# Matrices are [in, out] here, except LOLA's router.
_GPT2 = _table("""
    embed/tokens          transformer.wte.weight                    V D -> V D
    embed/positions       transformer.wpe.weight                    T D -> T D
    final_norm/scale      transformer.ln_f.weight                   D -> D
    final_norm/bias       transformer.ln_f.bias                     D -> D
    unembed               lm_head.weight                            V D -> D V
    attention/norm/scale  transformer.h.{layer}.ln_1.weight         D -> D
    attention/norm/bias   transformer.h.{layer}.ln_1.bias           D -> D
    attention/wq          transformer.h.{layer}.attn.c_attn.weight  D (3 N H) -> D N H  0
    attention/wk          transformer.h.{layer}.attn.c_attn.weight  D (3 N H) -> D N H  1
    attention/wv          transformer.h.{layer}.attn.c_attn.weight  D (3 N H) -> D N H  2
    attention/bq          transformer.h.{layer}.attn.c_attn.bias    (3 N H) -> N H  0
    attention/bk          transformer.h.{layer}.attn.c_attn.bias    (3 N H) -> N H  1
    attention/bv          transformer.h.{layer}.attn.c_attn.bias    (3 N H) -> N H  2
    attention/wo          transformer.h.{layer}.attn.c_proj.weight  (N H) D -> N H D
    attention/bo          transformer.h.{layer}.attn.c_proj.bias    D -> D
    mlp/norm/scale        transformer.h.{layer}.ln_2.weight         D -> D
    mlp/norm/bias         transformer.h.{layer}.ln_2.bias           D -> D
    mlp/up                transformer.h.{layer}.mlp.c_fc.weight     D F -> D F
    mlp/up_bias           transformer.h.{layer}.mlp.c_fc.bias       F -> F
    mlp/down              transformer.h.{layer}.mlp.c_proj.weight   F D -> F D
    mlp/down_bias         transformer.h.{layer}.mlp.c_proj.bias     D -> D
    moe/norm/scale        transformer.h.{layer}.ln_2.weight         D -> D
    moe/norm/bias         transformer.h.{layer}.ln_2.bias           D -> D
""")
_LOLA = _GPT2 | _table("""
    moe/router/kernel      transformer.h.{layer}.moe.gate.weight                     E D -> D E
    moe/experts/up         transformer.h.{layer}.moe.experts.{expert}.c_fc.weight    D F -> D F
    moe/experts/up_bias    transformer.h.{layer}.moe.experts.{expert}.c_fc.bias      F -> F
    moe/experts/down       transformer.h.{layer}.moe.experts.{expert}.c_proj.weight  F D -> F D
    moe/experts/down_bias  transformer.h.{layer}.moe.experts.{expert}.c_proj.bias    D -> D
""")

# Keys are `model_type`. A model that several families can hold is saved as the first of them.
FAMILIES = {
    "llama": Family("LlamaForCausalLM", _LLAMA),
    "mistral": Family("MistralForCausalLM", _LLAMA),
    "qwen2": Family("Qwen2ForCausalLM", _LLAMA),
    "qwen3": Family("Qwen3ForCausalLM", _QWEN3),
    "nemotron": Family("NemotronForCausalLM", _LLAMA),
    "gpt2": Family("GPT2LMHeadModel", _GPT2),
    "mixtral": Family("MixtralForCausalLM", _MIXTRAL, (_MIXTRAL | _STACKED,)),
    "olmoe": Family("OlmoeForCausalLM", _OLMOE, (_OLMOE | _STACKED,)),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", _QWEN3_MOE, (_QWEN3_MOE | _STACKED,)),
    "lola_v1": Family("LOLALMHeadModel", _LOLA),
    "skywork": Family("SkyworkForCausalLM", _MIXTRAL, (_MIXTRAL | _SKYWORK_REMOTE,)),
}

# Constants that some files contain.
IGNORED = r"(rotary_emb\.inv_freq|(^|\.)h\.\d+\.attn\.(bias|masked_bias))$"
