"""The mixtures of published systems, as the shares of `config.data.mixture.shares`.

They are in the units of their sources: percent of the tokens, or billions of tokens.
"""

# LLM-jp corpus v3, for LLM-jp-3 and for Drop-Upcycling's 152M and 3.7B (arXiv 2502.19261): 2072.5 B
# tokens, in percent, from the training scripts. Common Crawl comes in three parts.
LLM_JP_3 = (
    ("code_stack", 5.5),
    ("ja_cc_1", 22.25),
    ("ja_cc_2", 7.29),
    ("ja_cc_3", 7.26),
    ("ja_warp_pdf", 11.45),
    ("ja_warp_html", 0.13),
    ("ja_kaken", 0.09),
    ("ja_wiki", 0.12),
    ("en_dolma_cc_head", 29.36),
    ("en_dolma_c4", 8.76),
    ("en_dolma_reddit", 4.01),
    ("en_dolma_pes2o", 3.03),
    ("en_dolma_books", 0.27),
    ("en_dolma_wiki", 0.19),
    ("en_wiki", 0.23),
    ("zh_wiki", 0.04),
    ("ko_wiki", 0.02),
)
# Drop-Upcycling's 1.5B (arXiv 2502.19261): 1006 B tokens, in percent, from the training scripts.
DROP_UPCYCLING_1_5B = (
    ("code_stack", 10.05),
    ("ja_cc", 49.46),
    ("ja_wiki", 0.16),
    ("ja_kaken", 0.11),
    ("en_dolma_cc", 17.65),
    ("en_dolma_c4", 10.77),
    ("en_dolma_reddit", 5.43),
    ("en_dolma_pes2o", 4.88),
    ("en_dolma_books", 0.57),
    ("en_dolma_wiki", 0.92),
)
# OLMoE-mix (arXiv 2409.02060), in billions of tokens.
OLMOE = (
    ("dclm", 3860),
    ("starcoder", 101),
    ("pes2o", 57.2),
    ("arxiv", 21.1),
    ("openwebmath", 12.7),
    ("algebraicstack", 12.6),
    ("wikipedia", 3.69),
)
