"""What is told of errors: one line, whatever they say."""

import pytest
from pydantic import ValidationError

from model.config import RecipeConfig
from model.errors import LONGEST_LINE, LONGEST_REASON, one_line, reason


def test_a_line_is_one_that_a_terminal_shows() -> None:
    assert one_line("a\n\tb  c") == "a b c"
    assert one_line("café 红\x1b[31m\ud800\x00") == "café 红\\x1b[31m\\ud800\\x00"
    assert one_line("x" * 10**6) == "x" * LONGEST_LINE + "…"


def test_a_reason_names_what_is_wrong() -> None:
    with pytest.raises(ValidationError) as caught:
        RecipeConfig.model_validate({"minutes": -1, "a\nb": "x" * 10**6})
    assert reason(caught.value) == "minutes: Input should be greater than or equal to 0"
    assert reason(KeyError("grid")) == "'grid' is missing"
    assert reason(ValueError("not\nright")) == "not right"
    assert reason(ZeroDivisionError("by zero")) == "ZeroDivisionError: by zero"
    assert len(reason(ValueError("x" * 10**6))) == LONGEST_REASON
