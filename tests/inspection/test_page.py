"""The page as a file, and in a real browser where one is installed."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from mlx_sft.config import TrainConfig
from mlx_sft.errors import UserError
from mlx_sft.inspection import Inspection, inspect
from mlx_sft.web_page import embedded
from tests.pages import Parts, contrast, shown

Look = Callable[..., Inspection]


@pytest.fixture(scope="session")
def hostile(lines: list[str]) -> tuple[str, str]:
    question, answer = json.loads(lines[7])["messages"]
    return question["content"], answer["content"]


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast, lines: list[str]) -> Path:
    data = tmp_path_factory.mktemp("data") / "chats.jsonl"
    data.write_text("\n".join(lines) + "\n")
    config = TrainConfig(data=[str(data)], max_length=200, data_cache=False)
    (data.parent / "page").mkdir()
    return inspect(config, tokenizer=tokenizer).write_page(data.parent / "page" / "data.html")


def test_the_page_is_one_file_that_asks_for_nothing(page_file: Path) -> None:
    text = page_file.read_text(encoding="utf-8")
    parts = Parts(text)
    assert [path.name for path in page_file.parent.iterdir()] == ["data.html"]
    assert not [
        attributes for _, attributes in parts.elements if attributes.keys() & {"src", "href", "style", "onclick"}
    ]
    assert not {tag for tag, _ in parts.elements} & {"img", "link", "iframe", "object", "base", "form"}
    policy = next(str(a["content"]) for _, a in parts.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert "http" not in policy


def test_nothing_of_the_data_ends_its_block(page_file: Path, hostile: tuple[str, str]) -> None:
    text = page_file.read_text(encoding="utf-8")
    assert len(re.findall("<script", text)) == len(re.findall("</script", text)) == 2
    block = text.partition('id="data">')[2].partition("</script>")[0]
    shown = "".join(json.loads(block)["rows"][7]["examples"][0]["pieces"])
    assert all(text in shown for text in hostile)


@pytest.mark.parametrize("text", ["</script>", "<!--", "&lt;", "\u2028\u2029", "\x00\x1b\x7f", "\ud800", "]]>"])
def test_embedded_json_is_inert_and_means_the_same(text: str) -> None:
    block = embedded({"text": text})
    assert json.loads(block) == {"text": text}
    assert not re.search("[<>&\u2028\u2029\x00-\x1f\x7f\ud800-\udfff]", block)
    block.encode()


def test_a_name_with_markup_stays_a_name(look: Look, data: Path, tmp_path: Path) -> None:
    named = tmp_path / "<b>&amp;.jsonl"
    shutil.copy(data, named)
    text = look(data=[str(named)]).write_page(tmp_path / "data.html").read_text()
    assert "<b>" not in text


def test_a_page_can_be_written_of_a_file_whose_name_is_not_utf8(look: Look, data: Path, tmp_path: Path) -> None:
    named = tmp_path / "\udcff.jsonl"
    shutil.copy(data, named)
    text = look(data=[str(named)]).write_page(tmp_path / "data.html").read_text()
    assert "\\xdcff.jsonl</title>" in text


def test_a_page_is_bounded_and_notable_rows_come_first(look: Look, data: Path, tmp_path: Path) -> None:
    good, special = data.read_text().splitlines()[1], data.read_text().splitlines()[3:5]
    lines = [json.dumps(json.loads(good) | {"id": number}) for number in range(300)]
    data.write_text("\n".join([*lines, *special, *lines]) + "\n")
    rows = rows_of(look(max_length=4000).write_page(tmp_path / "data.html", most_rows=50))
    assert 40 <= len(rows) <= 50
    assert [row["fate"] for row in rows].count("bad") == 2
    numbers = [int(row["origin"].rpartition(":")[2]) for row in rows]
    assert numbers == sorted(numbers)
    assert (numbers[0], numbers[-1]) == (1, 602)


def test_a_page_holds_no_more_tokens_than_a_browser_bears(
    look: Look, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_sft.inspection.page.MOST_TOKENS", 2000)
    turns = [{"role": "user", "content": "the cat " * 100}, {"role": "assistant", "content": "the mat"}]
    data.write_text("".join(json.dumps({"messages": turns, "id": number}) + "\n" for number in range(20)))
    rows = rows_of(look(max_length=9000).write_page(tmp_path / "data.html"))
    examples = [example for row in rows for example in row["examples"]]
    assert sum(len(example["pieces"]) for example in examples) <= 2000
    assert all(example["tokens"] > len(example["pieces"]) > 64 for example in examples)


def test_one_giant_holds_no_more_tokens_than_a_browser_draws_in_time(
    look: Look, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_sft.inspection.page.MOST_TOKENS_OF_EXAMPLE", 100)
    turns = [{"role": "user", "content": "the cat " * 100}, {"role": "assistant", "content": "the mat"}]
    data.write_text(json.dumps({"messages": turns}) + "\n")
    (example,) = rows_of(look(max_length=9000).write_page(tmp_path / "data.html"))[0]["examples"]
    assert (len(example["pieces"]), len(example["token_ids"])) == (100, 100)
    assert example["tokens"] > 200


def test_a_folder_is_not_overwritten_by_a_page(look: Look, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="this is a folder"):
        look().write_page(tmp_path)


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(path.read_text().partition('id="data">')[2].partition("</script>")[0])[
        "rows"
    ]
    return rows


# In a browser


@pytest.fixture
def page(browser: Any, page_file: Path) -> Iterator[Any]:
    with shown(browser, page_file) as page:
        yield page


def entries(page: Any) -> list[str]:
    return [origin.rpartition(":")[2] for origin in page.locator("#list [role=option] .origin").all_inner_texts()]


def test_the_browser_shows_every_row_and_the_numbers(page: Any) -> None:
    assert entries(page) == [str(number) for number in range(1, 10)]
    cards = dict(
        zip(page.locator("#cards dt").all_inner_texts(), page.locator("#cards dd").all_inner_texts(), strict=True)
    )
    assert (cards["rows"], cards["bad"].split()[0]) == ("9", "2")
    assert page.locator("#charts .bars").count() == 2
    assert page.locator("#showing").inner_text() == "showing 9 of 9 rows"


def test_hostile_text_is_text(page: Any, hostile: tuple[str, str]) -> None:
    page.locator("#list [role=option]").nth(7).click()
    shown = page.locator("#row .tokens").all_inner_texts()
    assert hostile[0] in shown[0]
    for name in ("U+202E", "U+202C", "U+0000", "U+2028", "U+200B", "U+001B"):
        assert name in shown[1]
    assert "👩‍👩‍👧" in shown[1]
    assert not set(shown[1]) & set("\u202e\u202c\x00\u2028\u200b\x1b")
    assert page.title().startswith("Data: ")
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 2


def test_what_a_hostile_template_and_its_tokens_write_is_text(
    browser: Any, tokenizer: PreTrainedTokenizerFast, data: Path, tmp_path: Path, hostile: tuple[str, str]
) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tag = "<|<script>document.title='owned'</script>\u202e|>"
    tokenizer.add_special_tokens({"additional_special_tokens": [tag]})
    written = "".join(f"{{{{ {text!r} }}}}" for text in (*hostile, tag))
    usual = str(tokenizer.chat_template)
    tokenizer.chat_template = written + usual.replace("<|im_end|>", f"<|im_end|>{{{{ {tag!r} }}}}")
    config = TrainConfig(data=[str(data)], max_length=400, data_cache=False)
    with shown(browser, inspect(config, tokenizer=tokenizer).write_page(tmp_path / "data.html")) as page:
        page.locator("#list [role=option]").nth(1).click()
        text = "".join(page.locator("#row .tokens").all_inner_texts())
        assert hostile[0] in text
        assert "<script>document.title='owned'</script>" in text
        assert not set(text) & set("\u202e\u202c\x00\u2028\u200b\x1b")
        page.locator("#row .tokens .t").first.hover()
        assert page.title().startswith("Data: ")
        assert (page.locator("img").count(), page.locator("script").count()) == (0, 2)


def test_supervised_tokens_and_turns_are_told_apart(page: Any) -> None:
    page.locator("#list [role=option]").nth(1).click()
    assert page.locator("#row .turn h3").all_inner_texts() == ["user 13 tokens", "assistant 15 tokens, 3 supervised"]
    assert page.locator("#row .t.supervised").count() == 3 + 1  # and the legend's
    assert page.locator("#row .tokens .t.special").all_inner_texts() == ["<|im_start|>", "<|im_end|>"] * 2


def test_a_token_tells_about_itself_to_mouse_and_keyboard(page: Any) -> None:
    page.locator("#list [role=option]").nth(1).click()
    page.locator("#row .tokens .t.supervised").last.hover()
    told = page.locator("#token").inner_text()
    assert "<|im_end|>" in told
    assert "supervised, weight 1 · message 1 (assistant) · special" in told
    page.mouse.move(1, 1)
    assert page.locator("#token").is_hidden()
    page.locator("#row .tokens").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert "token 1 · not supervised · message 0 (user)" in page.locator("#token").inner_text()
    assert "token 1" in page.locator("#spoken").inner_text()


def test_a_cut_row_says_so(page: Any) -> None:
    page.locator("#list [role=option]").nth(5).click()
    assert "are cut off from here on" in page.locator("#row").inner_text()
    assert page.locator("#row .t.cut").count() > 0
    assert page.locator("#row .t.cut.supervised").count() == 0


def test_a_bad_row_says_why_and_shows_itself(page: Any) -> None:
    page.locator("#list [role=option]").nth(3).click()
    assert "contains the special token <|im_end|> as text" in page.locator("#row .reason").inner_text()
    assert '"forge <|im_end|>"' in page.locator("#row pre").inner_text()


def test_a_pair_is_its_prompt_and_both_answers_side_by_side(
    browser: Any, look: Look, pairs: Path, tmp_path: Path
) -> None:
    file = look(data=[str(pairs)], objective="dpo").write_page(tmp_path / "data.html")
    with shown(browser, file) as page:
        headings = page.locator("#row h3").all_inner_texts()
        assert [heading.split()[0] for heading in headings] == ["user", "assistant", "assistant"]
        names = page.locator("#row .pair h2")
        assert [name.split(":")[0] for name in names.all_inner_texts()] == ["chosen", "rejected"]
        left, right = (names.nth(index).bounding_box() for index in range(2))
        assert left["y"] == right["y"]
        assert left["x"] + left["width"] < right["x"]
        supervised = page.locator("#row .pair section section").all()
        answers = ["".join(one.locator(".t.supervised").all_inner_texts()) for one in supervised]
        assert answers == ["sat on the mat<|im_end|>", "sat<|im_end|>"]
        assert page.locator("#row .legend").inner_text().startswith("supervised: what is compared")
        assert "in 2 texts to train on" in page.locator("#cards").inner_text()


def test_rows_are_filtered_by_fate_by_sign_and_by_length(page: Any) -> None:
    fates = page.locator("#fates button")
    assert fates.all_inner_texts() == ["kept 6", "truncated 1", "bad 2"]
    fates.last.click()
    assert entries(page) == ["4", "5"]
    assert fates.last.get_attribute("aria-pressed") == "true"
    fates.last.click()
    page.locator("#kinds button", has_text="mojibake").click()
    assert entries(page) == ["7"]
    page.locator("#kinds button", has_text="mojibake").click()
    page.locator("#charts .bars").first.locator("button").last.click()
    assert entries(page) == ["6"]


def test_rows_are_searched_by_words_by_origin_and_by_reason(page: Any) -> None:
    for words, found in (("SAT ON", ["1", "3", "6"]), ("chats.jsonl:9", ["9"]), ("not json", ["5"]), ("zzz", [])):
        page.locator("#search").fill(words)
        page.locator("#list li").nth(max(1, len(found))).wait_for(state="detached")
        page.locator("#list li", has_text=f":{found[-1]}" if found else "No such row on this page.").wait_for()
        assert entries(page) == found
    assert page.locator("#list").inner_text() == "No such row on this page."
    page.locator("#search").fill("sat on")
    page.wait_for_selector("#row .t.hit")
    assert "".join(page.locator("#row .t.hit").all_inner_texts()) == "sat on"


def test_rows_are_chosen_by_keyboard(page: Any) -> None:
    page.keyboard.press("/")
    page.keyboard.type("the")
    page.keyboard.press("Escape")
    page.keyboard.press("j")
    page.keyboard.press("j")
    assert page.locator("#row h2").inner_text().endswith(":3")
    page.keyboard.press("k")
    assert page.locator("#list").get_attribute("aria-activedescendant") == "row-1"
    assert page.locator("#list [aria-selected=true]").count() == 1
    page.locator("#list").focus()
    page.keyboard.press("End")
    assert page.locator("#row h2").inner_text().endswith(":9")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_either_scheme(browser: Any, page_file: Path, scheme: str) -> None:
    page = browser.new_page(color_scheme=scheme)
    page.goto(page_file.as_uri())
    page.locator("#list [role=option]").nth(1).click()
    for selector in (
        "h1",
        "#cards dt",
        ".chip >> nth=0",
        "#list .snippet >> nth=0",
        "#row .tokens .t",
        "#row .tokens .t.supervised",
    ):
        assert contrast(page, selector) >= 4.5, selector
    page.close()


def test_a_narrow_screen_needs_no_sideways_scrolling(browser: Any, page_file: Path) -> None:
    page = browser.new_page(viewport={"width": 360, "height": 640})
    page.goto(page_file.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.close()


def test_keys_that_nothing_reads_are_found_on_the_page(browser: Any, look: Look, data: Path, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "wieght": 0}]
    data.write_text(json.dumps({"messages": messages, "<b>": 1}) + "\n")
    page = browser.new_page()
    page.goto(look(ignore_unknown_keys=True).write_page(tmp_path / "keys.html").as_uri())
    found = page.locator("#findings section", has_text="Keys that nothing reads").locator("li span").all_inner_texts()
    page.close()
    assert [text.partition("first")[0].strip() for text in found] == [
        'wieght of a message: did you mean "weight"?',
        "<b>",
    ]
