"""The family of each language of the embedded corpora, by its code.

The families are the top-level ones of Glottolog (Hammarström et al., glottolog.org, CC-BY-4.0), as
URIEL names them (Littell et al., EACL 2017; lang2vec 1.1.2). Three are missing there and are set
by hand: ekk is Uralic, eus is Basque, an isolate, and hms is Hmong-Mien.
"""

# Codes of ISO 639-3. A family with one language here has no relatives to be near to.
LANGUAGES = {
    "Abkhaz-Adyge": "abk",
    "Afro-Asiatic": "hau som amh arb heb",
    "Athapaskan-Eyak-Tlingit": "nav",
    "Atlantic-Congo": "swh zul yor ibo wol",
    "Austroasiatic": "kha khm vie",
    "Austronesian": "haw ind jav plt tgl",
    "Aymara": "ayr",
    "Basque": "eus",
    "Dravidian": "tel kan tam",
    "Eskimo-Aleut": "kal",
    "Hmong-Mien": "hms",
    "Indo-European": "hye lit cym deu eng nld swe ell ben hin pes fra ita por ron spa ces pol rus "
    "ukr",
    "Japonic": "jpn",
    "Kartvelian": "kat",
    "Koreanic": "kor",
    "Mande": "bam",
    "Mayan": "quc",
    "Mongolic": "khk",
    "Nilotic": "dip",
    "Quechuan": "quz",
    "Sino-Tibetan": "bod mya cmn yue",
    "Tai-Kadai": "lao shn tha",
    "Tupian": "gug",
    "Turkic": "uzn kaz azj tur",
    "Uralic": "ekk fin hun",
    "Uto-Aztecan": "nhn",
}
FAMILIES = {code: family for family, codes in LANGUAGES.items() for code in codes.split()}
# The two-letter codes of ISO 639-1 that BCP 47 prefers. A macrolanguage stands for the member that
# is in the table: ar for Standard Arabic, zh for Mandarin, fa for Western Farsi.
SHORT = dict(
    pair.split(":")
    for pair in """
ab:abk am:amh ar:arb ay:ayr az:azj bm:bam bn:ben bo:bod cs:ces cy:cym de:deu el:ell en:eng es:spa
et:ekk eu:eus fa:pes fi:fin fr:fra gn:gug ha:hau he:heb hi:hin hu:hun hy:hye id:ind ig:ibo it:ita
ja:jpn jv:jav ka:kat kk:kaz kl:kal km:khm kn:kan ko:kor lo:lao lt:lit mg:plt mn:khk my:mya nl:nld
nv:nav pl:pol pt:por qu:quz ro:ron ru:rus so:som sv:swe sw:swh ta:tam te:tel th:tha tl:tgl tr:tur
uk:ukr uz:uzn vi:vie wo:wol yo:yor zh:cmn zu:zul
""".split()
)


def canonical(code: str) -> str:
    """The ISO 639-3 code of a language tag such as "pt-BR" or "zh_cn", without region and script.

    A tag that is not in the table, such as the name of a domain, is returned whole in lower case.
    """
    tag = code.strip().lower()
    primary = tag.replace("_", "-").split("-")[0]
    known = SHORT.get(primary, primary)
    return known if known in FAMILIES else tag


def family(code: str) -> str | None:
    """The top-level family of a language tag; None if the table does not have it."""
    return FAMILIES.get(canonical(code))
