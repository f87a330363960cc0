"""The client's README is run as it stands: its examples do what they say."""

import re
from pathlib import Path

import custody
import pytest
from custody.testing import FakeCustody

from tests.clients.python.served import served

README = Path(__file__).resolve().parents[3] / "clients" / "python" / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_there_are_two_examples() -> None:
    """All examples of the page are run below."""
    assert len(EXAMPLES) == 2


def test_from_consent_to_payment(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The first example, on a connection: the person approves, a balance is read, the payment is settled."""
    fake = FakeCustody()
    account = fake.add_account("AT611904300234573201")
    fake.add_balance(account, custody.Money("100", "EUR"))
    with served(fake) as server:
        monkeypatch.setenv("CUSTODY_ADDRESS", server.address)
        exec(compile(EXAMPLES[0], str(README), "exec"), {"visit": fake.approve})

    printed = capsys.readouterr().out.splitlines()
    assert printed == [f"{account} INTERIM_AVAILABLE 100.00 EUR", "SETTLED 12.34 EUR"]


def test_testing_your_application() -> None:
    """The second example: the fake does what the example makes it do."""
    names: dict[str, object] = {}

    exec(compile(EXAMPLES[1], str(README), "exec"), names)

    assert isinstance(names["client"], custody.Client)
