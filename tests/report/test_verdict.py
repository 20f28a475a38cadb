"""What a page says in words of runs of every course."""

from __future__ import annotations

import math

import pytest

from mlx_sft.report.runs import read
from mlx_sft.report.verdict import Sentence, more_with, verdict
from mlx_sft.run_folder import RunFolder
from tests.report.conftest import MakeFolder, Record, evaluation, step

pytestmark = pytest.mark.fast


def falling(count: int = 100, to: float = 1.0, rate: float = 10.0) -> list[Record]:
    return [step(n, to + 2 * math.exp(-rate * n / count), epoch=3 * n / count) for n in range(1, count + 1)]


def said(make_folder: MakeFolder, records: list[Record], **folder: object) -> list[Sentence]:
    files = read(RunFolder(make_folder(records, **folder)))
    return verdict(files, files.state)


def only(sentences: list[Sentence], words: str) -> Sentence:
    (found,) = [sentence for sentence in sentences if words in sentence.text]
    return found


def test_validation_that_got_worse_names_the_epoch_and_the_step(make_folder: MakeFolder) -> None:
    evaluations = [evaluation(33, 2.0, epoch=1.0), evaluation(66, 1.5, epoch=2.0), evaluation(100, 1.9, epoch=3.0)]
    sentences = said(make_folder, falling() + evaluations)
    sentence = only(sentences, "got worse after epoch 2: from 1.5000 to 1.9000")
    assert sentence.weight == "warn"
    assert "the result is that of step 66" in sentence.text
    assert sentences[0] == Sentence("good", "Finished after step 100, 3 epochs in 3:23.")


def test_a_loss_that_still_falls_says_how_to_go_on(make_folder: MakeFolder) -> None:
    sentences = said(make_folder, [*falling(), evaluation(50, 2.0), evaluation(100, 1.5)])
    assert only(sentences, "still falling at the end").text.endswith("/run --epochs 5`).")
    steps = said(
        make_folder, [*falling(), evaluation(50, 2.0), evaluation(100, 1.5)], name="b", settings={"max_steps": 100}
    )
    assert only(steps, "still falling at the end").text.endswith("/b --max-steps 150`).")


def test_a_loss_that_falls_by_little_of_what_it_came_has_levelled_off(make_folder: MakeFolder) -> None:
    sentences = said(make_folder, [*falling(to=0.08), evaluation(50, 0.091), evaluation(100, 0.081)])
    assert "It has levelled off" in only(sentences, "The validation loss").text


def test_the_training_loss_is_told_as_what_the_model_gives_a_right_token(make_folder: MakeFolder) -> None:
    course = [*falling(), evaluation(50, 2.0), evaluation(100, 1.5)]
    told = only(said(make_folder, course), "The training loss went from 2.496 to 1: ").text
    assert told.endswith("to each next token of an answer the model now gives a chance of 37 %, at first of 8.2 %.")
    of_pairs = said(make_folder, course, name="b", settings={"objective": "dpo"})
    assert only(of_pairs, "The training loss").text == "The training loss went from 2.496 to 1."


def test_the_only_evaluation_of_a_run_that_is_over_is_that_of_its_result(make_folder: MakeFolder) -> None:
    course = [*falling(), evaluation(100, 1.5)]
    assert "the only one: it is that of the result" in only(said(make_folder, course), "The validation loss").text
    running = said(make_folder, course, name="b", finished=False, planned=200)
    assert "The validation loss is 1.5000 after step 100" in only(running, "The validation loss").text


def test_a_run_that_was_given_its_time_goes_on_with_twice_that(make_folder: MakeFolder) -> None:
    files = read(RunFolder(make_folder(falling(), settings={"for": "45m", "max_steps": 100})))
    assert more_with(files).endswith("/run --max-steps 150 --for 5400s")


def test_a_level_loss_says_so(make_folder: MakeFolder) -> None:
    sentences = said(make_folder, [*falling(), evaluation(50, 2.0), evaluation(80, 1.5), evaluation(100, 1.495)])
    assert only(sentences, "levelled off").weight == "good"


def test_a_loss_that_is_level_because_the_learning_rate_went_to_zero_does_not_say_that_more_is_in_vain(
    make_folder: MakeFolder,
) -> None:
    level = [*falling(), evaluation(50, 2.0), evaluation(80, 1.5), evaluation(100, 1.495)]
    told = only(said(make_folder, level), "levelled off").text
    assert "where answers are not right yet, more epochs may still help (`mlx-sft train --resume " in told
    assert told.endswith("/run --epochs 5`).")
    constant = said(make_folder, level, name="b", settings={"scheduler": "constant"})
    assert only(constant, "levelled off").text.endswith("It has levelled off: more of the same would change little.")


def test_a_loss_that_diverged_is_bad_news(make_folder: MakeFolder) -> None:
    records = falling() + [step(n, 9.0) for n in range(101, 141)]
    sentence = only(said(make_folder, records, planned=140), "The loss diverged: it was")
    assert sentence.weight == "bad"
    assert "lower --lr" in sentence.text


def test_a_loss_that_never_was_finite_is_bad_news(make_folder: MakeFolder) -> None:
    sentences = said(make_folder, [step(n, None) for n in range(1, 6)], finished=False)
    assert only(sentences, "No step had a finite loss").weight == "bad"
    assert "5 steps were skipped" in only(sentences, "skipped").text


def test_a_loss_that_did_not_move_asks_for_a_higher_rate(make_folder: MakeFolder) -> None:
    assert only(said(make_folder, [step(n, 2.0) for n in range(1, 101)]), "hardly moved").weight == "warn"


def test_rows_that_are_known_by_heart_and_no_rows_held_out(make_folder: MakeFolder) -> None:
    sentences = said(make_folder, falling(to=0.0), data={"valid": {"rows": 0}})
    assert only(sentences, "knows these rows by heart").weight == "warn"
    assert "--valid-fraction" in only(sentences, "No rows are held out").text


def test_a_run_that_was_stopped_says_how_it_goes_on(make_folder: MakeFolder) -> None:
    sentences = said(make_folder, falling(40), finished=False)
    assert sentences[0].text.startswith("Stopped after step 40 of 100")
    assert "mlx-sft train --resume" in sentences[0].text
    assert "error.log" not in sentences[0].text
    assert "Stopped after step 0 of 100." in said(make_folder, [], name="b", finished=False)[0].text


def test_recoveries_are_told(make_folder: MakeFolder) -> None:
    others = [
        {"kind": "out_of_memory", "step": 3, "micro_batch_tokens": 256},
        {"kind": "rollback", "step": 2, "diverged_at": 9},
        {"kind": "interrupted", "step": 4, "times": 1},
        {"kind": "interrupted", "step": 5, "times": 1},
    ]
    text = " ".join(sentence.text for sentence in said(make_folder, falling() + others))
    assert "Memory ran out once" in text
    assert "went back, once" in text
    assert "took the GPU away 2 times" in text
