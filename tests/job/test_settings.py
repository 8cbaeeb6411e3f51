import pytest

from beit.errors import UserError
from beit.job.settings import JobSettings


@pytest.mark.parametrize(
    "wrong",
    [{"max_nonfinite_steps": -1}, {"max_nonfinite_steps": 1.5}, {"stop_seconds": float("nan")}],
)
def test_numbers_are_checked(wrong) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        JobSettings(**wrong)
