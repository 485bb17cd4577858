"""How many logins may be under way at a legacy server."""

from __future__ import annotations

import pytest

from bascule.errors import LegacyUnavailable
from bascule.shares import Shares

HERE, THERE, ELSEWHERE = ("here", 993), ("there", 993), ("elsewhere", 993)


def test_a_server_has_its_share_and_no_more() -> None:
    shares = Shares(in_all=10, at_one_server=2)
    shares.take(HERE)
    shares.take(HERE)
    with pytest.raises(LegacyUnavailable, match="here:993 is slow"):
        shares.take(HERE)
    shares.take(THERE)
    shares.give_back(HERE)
    shares.take(HERE)


def test_all_of_them_together_have_no_more_than_there_is() -> None:
    shares = Shares(in_all=3, at_one_server=2)
    for server in (HERE, HERE, THERE):
        shares.take(server)
    with pytest.raises(LegacyUnavailable, match="elsewhere:993 was not asked"):
        shares.take(ELSEWHERE)
    shares.give_back(HERE)
    shares.take(ELSEWHERE)


def test_one_that_does_not_answer_is_tried_by_one_login_at_a_time_until_it_answers() -> None:
    shares = Shares(in_all=10, at_one_server=5)
    shares.judge(HERE, answers=False)
    shares.take(HERE)
    with pytest.raises(LegacyUnavailable, match="did not answer lately"):
        shares.take(HERE)
    shares.take(THERE)
    shares.give_back(HERE)
    shares.take(HERE)
    shares.judge(HERE, answers=True)
    shares.take(HERE)
