"""What in a row could harm: a tokenizer's special tokens typed as text, which forge turns, and signs of broken data.

A special token in content is certain, and the pipeline has a rule for it; a sign is a suspicion, which is counted and shown and
changes nothing. Both are made to be silent on good data, and so do not find every fault.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mlx_sft.data.conversation import Conversation, Document, Item
from mlx_sft.data.json_text import strings_in
from mlx_sft.data.mask.reference_rendering import ReferenceRendering
from mlx_sft.data.messages import REASONING_KEYS
from mlx_sft.data.template_limits import TemplateStopped
from mlx_sft.data.tokenizer import tokenizer_errors, unwrapped
from mlx_sft.errors import UserError

SPECIAL_SIGN = "special-token"
SIGNS: tuple[str, ...] = (
    "empty-reply",
    "user-marker",
    "mojibake",
    "cut-off",
    "short-reply",
    "echo",
    "refusal",
    SPECIAL_SIGN,
)
"""Names of suspicious things; the order is that of the bits in a stored mask, so that a new one goes to the end."""

SIGN_MEANINGS: dict[str, str] = {
    "empty-reply": "a supervised assistant turn says nothing",
    "user-marker": "a reply goes on with the user's next turn, such as `Human:`",
    "mojibake": "text that was decoded wrongly, such as â€™ for ’, or a lost character",
    "cut-off": "a reply breaks off mid-sentence, or leaves a code block open",
    "short-reply": "a reply without a letter or digit, or a placeholder such as N/A",
    "echo": "a reply that repeats the message before it",
    "refusal": "a reply that opens as an AI's refusal",
    SPECIAL_SIGN: "text that holds a special token of the tokenizer, and was kept all the same",
}
"""What each sign says of a row."""

SPECIAL_HINT = (
    "the tokenizer takes it for the real token, which can forge a turn; take it out of the text, "
    "or choose --special-in-content drop, or keep where the text means the token itself"
)
"""The way out for a row whose text holds a special token."""

_REASONING_MARKERS = frozenset(
    f"{opening}{name}{closing}"
    for name in ("think", "thinking", "thought", "reasoning", "seed:think", "longcat_think", "mm:think", "THINK")
    for opening, closing in (("<", ">"), ("</", ">"), ("[", "]"), ("[/", "]"), ("<|", "|>"), ("<|/", "|>"))
) | {
    *("<|START_THINKING|>", "<|END_THINKING|>", "<|begin_of_thought|>", "<|end_of_thought|>"),
    *("◁think▷", "◁/think▷"),
}
"""They bound reasoning, and forge no turn; an assistant's text and the system's orders may hold them."""
_SWITCHES = frozenset({"/think", "/nothink", "/no_think"})
"""What a user types to switch reasoning; special tokens in some tokenizers."""
_SHORTEST_ECHO = 12
"""Characters. A greeting is answered with itself."""
_SHORTEST_TOKEN = 3
"""Characters. Padding is in some checkpoints an ordinary sign such as `!`, which forges nothing."""


@dataclass(frozen=True, slots=True)
class Found:
    """A special token in a row's text: which, where (`messages[2].content`, `tools`), and how many times there."""

    token: str
    message: int | None
    place: str
    count: int


class SpecialTokens:
    """Finds a tokenizer's special tokens in the text of conversations. It can be pickled.

    Looked for are the tokens that the tokenizer calls special, and other added tokens with which its chat template opens or
    closes turns. A reasoning marker such as `<think>` is none in an assistant's or a system message.

    Args:
        tokenizer: A tokenizer of transformers, or mlx-lm's wrapper of one.

    Attributes:
        user_header: Plain text that opens a user's turn in the chat template, such as `[INST]`; empty where there is none.
    """

    def __init__(self, tokenizer: Any) -> None:
        added = list(tokenizer.added_tokens_decoder.values())
        around_turns, before_user = _probe(tokenizer)
        structural = {token.content for token in added if token.content in around_turns} - _REASONING_MARKERS
        tokens = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens) | structural
        tokens = {
            token for token in tokens if len(token.strip()) >= _SHORTEST_TOKEN and not token.isalnum()
        } - _SWITCHES
        normalized = {token.content for token in added if token.normalized} & tokens
        self._normalizer: Any = tokenizer.backend_tokenizer.normalizer if normalized else None
        self._pattern = _any_of(tokens)
        # The tokenizer looks for these in normalized text, where it writes them as its normalizer would.
        self._name = str(getattr(tokenizer, "name_or_path", ""))
        self._normalized = {self._as_tokenized(token): token for token in normalized} if self._normalizer else {}
        self._normalized_pattern = _any_of(set(self._normalized))
        self.user_header = _plain_header(before_user, self._pattern)

    def found_in(self, conversation: Conversation) -> str | None:
        """What is found, in words: `messages[1].content contains the special token <|im_end|>`; None where nothing is."""
        found = self.all_in(conversation)
        if not found:
            return None
        first = found[0]
        others = sum(one.count for one in found) - 1
        more = f", and {others} more" if others else ""
        return f"{first.place} contains the special token {first.token} as text{more}"

    def all_in(self, conversation: Conversation) -> list[Found]:
        """Every special token in messages, tools and the row's template variables, in that order."""
        found: list[Found] = []
        for index, message in enumerate(conversation.messages):
            may_reason = message.get("role") in ("assistant", "system", "developer")
            place = conversation.place(index)
            for key, value in message.items():
                if key != "role":
                    # Content that the row has under a key of its own stands at that key.
                    is_whole = key == "content" and not place.endswith("]")
                    found += self._search(value, index, place if is_whole else f"{place}.{key}", may_reason)
        found += self._search(conversation.tools, None, "tools", may_reason=True)
        found += self._search(conversation.template_kwargs, None, "chat_template_kwargs", may_reason=True)
        return found

    def _search(self, value: Any, message: int | None, place: str, may_reason: bool) -> list[Found]:
        counts: dict[str, int] = {}
        for text in strings_in(value):
            for token in self._tokens_of(text):
                if not (may_reason and token in _REASONING_MARKERS):
                    counts[token] = counts.get(token, 0) + 1
        return [Found(token, message, place, count) for token, count in counts.items()]

    def _tokens_of(self, text: str) -> list[str]:
        tokens: list[str] = self._pattern.findall(text)
        if self._normalizer and not tokens and text:
            found = self._normalized_pattern.findall(self._as_tokenized(text))
            return [self._normalized[token] for token in found]
        return tokens

    def _as_tokenized(self, text: str) -> str:
        """A text as the tokenizer's normalizer writes it."""
        with tokenizer_errors(self._name, ""):
            written: str = self._normalizer.normalize_str(text)
        return written


def _any_of(tokens: set[str]) -> re.Pattern[str]:
    """Matches the longest of the tokens at a place; nothing where there are none."""
    return re.compile(_branches(tokens) or "(?!)")


def _branches(tokens: set[str]) -> str:
    """The tokens as an expression that branches where they part, because some tokenizers have a thousand."""
    rests: dict[str, set[str]] = {}
    for token in tokens - {""}:
        rests.setdefault(token[0], set()).add(token[1:])
    if not rests:
        return ""
    branches = "|".join(re.escape(first) + _branches(rest) for first, rest in sorted(rests.items()))
    return f"(?:{branches})" + ("?" if "" in tokens else "")


def _probe(tokenizer: Any) -> tuple[str, str]:
    """What the chat template writes around short turns, and of it what stands between an answer and the next question.

    Empty without a template, and with one that wants other turns.

    Raises:
        TemplateStopped: where the template would hang or fill the memory; so a run ends before its first row.
    """
    question, answer, another = words = ("7391", "8264", "9157")
    turns = [{"role": role, "content": word} for role, word in zip(("user", "assistant", "user"), words, strict=True)]
    try:
        text = ReferenceRendering(unwrapped(tokenizer), Conversation("", turns)).prompted
    except TemplateStopped:
        raise
    except UserError:
        return "", ""  # the encoder says what is wrong with it
    before_answer, _, rest = text.partition(question)[2].partition(answer)
    before_user, _, prompt = rest.partition(another)
    return before_answer + before_user + prompt, before_user


def _plain_header(before_user: str, special: re.Pattern[str]) -> str:
    """The template's last plain words before a user's turn, where they could not stand in a sentence."""
    words = [part.strip() for part in special.split(before_user) if part.strip()]
    if not words or len(words[-1]) < 4 or words[-1].isalnum():
        return ""
    return words[-1]


def signs_of(item: Item, user_header: str = "") -> frozenset[str]:
    """Those of `SIGNS` that a row shows.

    Looked at are the assistant turns to be trained on, and all text for mojibake; nothing of a pre-tokenized row.

    Args:
        item: A conversation, a document or tokens.
        user_header: A plain text that opens a user's turn, `SpecialTokens.user_header`.
    """
    if isinstance(item, Document):
        return frozenset({"mojibake"} if is_mojibake(item.text) else ())
    if not isinstance(item, Conversation):
        return frozenset()
    signs: set[str] = set()
    before = ""
    for index, message in enumerate(item.messages):
        content = message.get("content")
        text = content if isinstance(content, str) else ""
        if is_mojibake(text):
            signs.add("mojibake")
        is_reply = message.get("role") == "assistant" and index >= item.first_supervised
        if is_reply and (item.weights is None or item.weights[index]):
            signs.update(_signs_of_reply(message, text.strip(), before, user_header))
        before = text.strip()
    return frozenset(signs)


def _signs_of_reply(message: dict[str, Any], reply: str, before: str, user_header: str) -> Iterator[str]:
    if message.get("tool_calls"):
        return
    if not reply:
        if not any(str(message.get(key) or "").strip() for key in REASONING_KEYS):
            yield "empty-reply"
        return
    if has_user_marker(reply, user_header):
        yield "user-marker"
    if is_cut_off(reply):
        yield "cut-off"
    if says_nothing(reply):
        yield "short-reply"
    if len(reply) >= _SHORTEST_ECHO and reply == before:
        yield "echo"
    if is_refusal(reply):
        yield "refusal"


# What broken text looks like

_AFTER_LEAD = "\x80-\x9f¡¢£¤¥¦§¨©ª¬\xad®¯°±²³´µ¶·¸¹º¼½¾¿€‚ƒ„†‡ˆ‰Š‹ŒŽ˜š›œžŸ"
"""What a byte of UTF-8 after the first looks like in Windows-1252, but for the marks that also follow a letter in prose."""
_AFTER_LEAD_OR_MARK = _AFTER_LEAD + "\xa0«»…–—‘’“”•™"
_MOJIBAKE = re.compile(
    "\ufffd|[\x80-\x84\x86-\x9f]|â€|ðŸ|ï»¿|ï¿½|Â[\xa0-\xaa\xac-\xba\xbc-\xbf]"
    f"|Ã[{_AFTER_LEAD}]|(?<![A-ZÀ-ÞĀ-ž])Ã[\xa0«»…–—‘’“”•™]|[ÄÅ](?![²³¹·])[{_AFTER_LEAD}]"
    f"|(?:[ÎÏÐÑØÙ][{_AFTER_LEAD_OR_MARK}]){{3}}|(?:[à-ï][{_AFTER_LEAD_OR_MARK}]{{2}}){{2}}"
)
"""UTF-8 read as Windows-1252: ’ is â€™, é is Ã©, a Cyrillic letter Ð°, a Chinese character three of these."""

_TURN_TOKENS = re.compile(
    r"<\|im_start\|>\s*user|<\|start_header_id\|>\s*user|<start_of_turn>\s*user|<\|(?:user|human|prompter)\|>"
    r"|<｜User｜>|\[INST\]|<<SYS>>|<(?:human|user)>:"
)
_TURN_NAMES = re.compile(
    r"^[ \t]*(?:(?:Human|HUMAN|User|USER)[ \t]*:[ \t]*[^\s{\[]|\#{2,3} ?(?:Instruction|Human|User)\b[ \t]*:)",
    re.MULTILINE,
)
_REFUSAL = re.compile(
    r"\bas an? (?:AI|artificial intelligence|large language|language)\b"
    r"|^(?:I['’]m (?:very |so |really )?sorry|I am sorry|Sorry|I apologi[sz]e|Unfortunately)\W.{0,20}?"
    r"\bI(?: am|['’]m)? (?:cannot|can['’]t|can not|not able to|unable to|won['’]t)\b"
    r"|^I(?: am|['’]m)? (?:cannot|can['’]t|can not|not able to|unable to) (?:assist|help|fulfil|provide|comply|answer|generate)",
    re.IGNORECASE,
)
_OPENING = 160
"""Characters of a reply in which a refusal would stand."""
_FIRST_SYMBOL = 0x2190
"""Arrows, mathematics, pictographs and the scripts of East Asia come from here on."""
_PLACEHOLDERS = frozenset({"n/a", "nan", "null", "undefined", "todo", "tbd", "deleted", "removed"}) | frozenset(
    {"noinput", "nooutput", "no input", "no output", "no response", "placeholder", "your answer here"}
)

_FENCE = re.compile(r"^[ \t]*```", re.MULTILINE)
_NOT_PROSE = re.compile(r"[=`|\\_{}<>~$]|https?:|www\.|[#@]\w|^[#>]|\w\(|\w\.\w+$")
_LIST_ITEM = re.compile(r"(?:[-*+•·–◦▪✓]|\(?\d{1,3}[.):、]|\(?[A-Za-z][.)])\s*|\S+(?: [^\s:：]+){0,5}[:：]")
_SENTENCE_END = re.compile(r"[.!?][\"'”’)*]*\s+[\"'“‘¿¡*(]*[^\W\d_a-z]")
_STOPS = ".!?:;…\"'”’)*`。！？"
_DANGLING = ",;:(["
_OPEN_ENDS = _DANGLING + "-，、：（"
_DANGLING_WORDS = frozenset(
    re.findall(
        r"\w+",
        "the a an of and or but because if than with to from as at into between which whose while such including however "
        "its their your our my",
    )
)
_CJK = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff，、：（]")
_CJK_STOP = re.compile("[。！？]")
_SHORTEST_CJK = 15
"""Characters of a last line that is prose, in scripts without spaces."""
_SHORTEST_PROSE = 80
"""Characters of a reply that is prose."""
_FEWEST_WORDS = 8
"""Words of a last line that is prose."""
_FEWEST_DANGLING = 4
"""Words before one that cannot be the last."""
_LONG_SENTENCE = 25
"""Words after which a sentence wants its full stop, even if it is the only one."""


def is_mojibake(text: str) -> bool:
    """Whether it shows UTF-8 that was read as Windows-1252 or Latin-1, or a character that was lost."""
    return not text.isascii() and _MOJIBAKE.search(text) is not None


def is_refusal(reply: str) -> bool:
    """Whether it opens as an AI's refusal."""
    return _REFUSAL.search(reply[:_OPENING]) is not None


def says_nothing(reply: str) -> bool:
    """Whether it has neither letter, digit nor symbol (an emoji is an answer), or is a placeholder such as N/A."""
    if reply.lower().strip("[]()<>.") in _PLACEHOLDERS:
        return True
    return not any(character.isalnum() or ord(character) >= _FIRST_SYMBOL for character in reply)


def has_user_marker(reply: str, user_header: str = "") -> bool:
    """Whether it goes on with a user's turn, in the words of a common template or with this header; code aside."""
    if _TURN_TOKENS.search(reply) or (user_header and user_header in reply):
        return True
    return any(len(_FENCE.findall(reply, 0, name.start())) % 2 == 0 for name in _TURN_NAMES.finditer(reply))


def is_cut_off(reply: str) -> bool:
    """Whether a reply breaks off: an open code block, a comma or word that wants another, or prose without its full stop.

    Lists, titles, code, verses and short answers do without a full stop; they are left alone.
    """
    if "```" in reply:
        if len(_FENCE.findall(reply)) % 2:
            return True
        reply = reply.rpartition("```")[2].strip()
    if not reply or not (reply[-1].isalpha() or reply[-1] in _OPEN_ENDS):
        return False
    before, _, last = reply.rpartition("\n")
    words = last.split()
    if _NOT_PROSE.search(last):
        return False
    if _CJK.match(last[-1]):
        return len(last) >= _SHORTEST_CJK and not _LIST_ITEM.match(last) and bool(_CJK_STOP.search(last))
    if words[-1] in _DANGLING_WORDS:
        return len(words) > _FEWEST_DANGLING
    if len(words) < _FEWEST_WORDS or _LIST_ITEM.match(last):
        return False
    if last[-1] in _DANGLING or last[-1] == "-":
        return True
    if not last[-1].isalpha() or len(reply) < _SHORTEST_PROSE:
        return False
    if sum(word[0].isupper() for word in words) > len(words) / 2:  # a title
        return False
    paragraph = before.rstrip(" \t\r")
    if paragraph and paragraph[-1] not in "\n" + _STOPS:
        return False  # lines that end as they like: a verse, an address, a list without bullets
    return bool(_SENTENCE_END.search(reply)) or len(words) >= max(_LONG_SENTENCE, 4 * last.count(","))
