"""Chinese and other scripts written without spaces: which characters they are, and the language that they suggest.

`HAN` and `UNSPACED` are ranges for use inside a regular expression's character class.
"""

import re

# CJK ideographs: extension A, the unified block and the compatibility block. What counts as Chinese everywhere.
HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
# With kana and Hangul: text that is compared character by character, because spaces do not mark its words.
UNSPACED = f"{HAN}\u3040-\u30ff\uac00-\ud7af"
CHINESE_CHARACTER = re.compile(f"[{HAN}]")


def has_chinese(text: str) -> bool:
    """Whether a text has at least one Chinese character."""
    return CHINESE_CHARACTER.search(text) is not None


def question_language(question: str) -> str:
    """zh where a question has a Chinese character, else en."""
    return "zh" if has_chinese(question) else "en"


def document_language(text: str) -> str:
    """zh where more than a tenth of the first 2000 characters is Chinese, else en: a guess for undeclared documents."""
    head = text[:2000]
    return "zh" if len(CHINESE_CHARACTER.findall(head)) > len(head) / 10 else "en"
