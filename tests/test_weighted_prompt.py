"""Weighted prompts: the syntax, the chunks, the weights' effect."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from closeup.errors import RequestError
from closeup.manifest import Tokenizer
from closeup.weighted_prompt import apply_weights, encode_weighted, parse_weights

FACTS = Tokenizer(path="", max_tokens=8, bos_token_id=90, eos_token_id=91, pad_token_id=92)


class LetterTokenizer:
    """One token a letter; spaces are none."""

    def tokens(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text if letter.isalpha()]


def encode(text: str) -> Any:
    tokenizer: Any = LetterTokenizer()
    return encode_weighted(tokenizer, FACTS, parse_weights(text))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a cat", [("a cat", 1.0)]),
        ("a (cat)", [("a ", 1.0), ("cat", 1.1)]),
        ("a ((cat))", [("a ", 1.0), ("cat", 1.21)]),
        ("a [cat] b", [("a ", 1.0), ("cat", 1 / 1.1), (" b", 1.0)]),
        ("a (cat:1.5) b", [("a ", 1.0), ("cat", 1.5), (" b", 1.0)]),
        ("(a (big:2) cat:0.5)", [("a ", 0.5), ("big", 1.0), (" cat", 0.5)]),
        (r"a \(cat\) \[b\] \\", [("a (cat) [b] \\", 1.0)]),
        ("a (cat", [("a ", 1.0), ("cat", 1.1)]),
        ("a cat)", [("a cat)", 1.0)]),
        ("(a:0)", [("a", 0.0)]),
        ("at 10:30 sharp", [("at 10:30 sharp", 1.0)]),
        ("(a:-1.5)", [("a", -1.5)]),
        ("", []),
        ("()", []),
    ],
)
def test_weights_are_read_as_web_interfaces_read_them(
    text: str, parts: list[tuple[str, float]]
) -> None:
    read = parse_weights(text)
    assert [part for part, _ in read] == [part for part, _ in parts]
    np.testing.assert_allclose([w for _, w in read], [w for _, w in parts], rtol=1e-12)


def test_a_long_prompt_of_brackets_and_digits_is_refused_in_no_time() -> None:
    started_s = time.process_time()
    with pytest.raises(RequestError, match="weight 106"):  # 1.1 to the power of 49
        parse_weights("(" * 49 + ":" + "1" * 3890 + "x" + ")" * 49)
    # Milliseconds; a search through the whole prompt at every bracket took 12 s of this thread.
    assert time.process_time() - started_s < 2


@pytest.mark.parametrize("text", ["(" * 60 + "a", "(a:99)"])
def test_absurd_weights_are_refused(text: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_weights(text, field_name="negative_prompt")
    assert list(caught.value.problems) == ["negative_prompt"]


def test_short_prompt_is_one_chunk_as_the_plain_tokenizer_gives_it() -> None:
    tokens = encode("a (b:1.5)")
    assert tokens.ids.tolist() == [[90, 0, 1, 91, 92, 92, 92, 92]]
    np.testing.assert_allclose(tokens.weights, [[1, 1, 1.5, 1, 1, 1, 1, 1]])


def test_long_prompt_is_cut_into_whole_chunks() -> None:
    tokens = encode("abcdef(gh:2)")
    assert tokens.ids.tolist() == [[90, 0, 1, 2, 3, 4, 5, 91], [90, 6, 7, 91, 92, 92, 92, 92]]
    assert tokens.weights[1].tolist() == [1, 2, 2, 1, 1, 1, 1, 1]
    assert encode("").ids.shape == (1, 8)


def test_weights_change_the_states_but_not_their_mean() -> None:
    r = np.random.default_rng(1)
    context = r.normal(0.3, 1, (8, 5)).astype(np.float32)
    weights = np.array([1, 1.5, 1, 0.5, 1, 1, 1, 1], np.float32)
    weighed = apply_weights(context, weights)
    assert abs(float(weighed.mean()) - float(context.mean())) < 1e-6  # float32 rounding
    ratio = weighed / context
    np.testing.assert_allclose(ratio[1] / ratio[0], 1.5, rtol=1e-5)
    np.testing.assert_allclose(ratio[3] / ratio[0], 0.5, rtol=1e-5)
    assert apply_weights(context, np.ones(8, np.float32)) is context
