"""A small example application: asks for a consent, reads accounts, pays an invoice. It uses only the Python client.

    python examples/shop.py --address unix:/run/custody/api.sock --redirect-port 8085

It never sees a token. What it says on standard output is for people; a line that begins with "OPEN " is an address that the
person opens in their browser.
"""

import argparse
import http.server
import sys
import uuid
from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit

import custody

OWNER = "person-4711"
INVOICE = "RF18539007547034"


def main() -> int:
    options = _options()
    with custody.Client(options.address, owner=OWNER) as client:
        client.wait_ready(timeout_seconds=30)
        consent = ask_for_consent(client, options.provider, options.redirect_port)
        account = read_accounts(client, consent)
        pay_invoice(client, consent, account)
    return 0


def ask_for_consent(client: custody.Client, provider: str, port: int) -> custody.Consent:
    """From the question to the person's answer: the application learns where to send them, and that they said yes."""
    with _Callback(port) as callback:
        pending = client.consents.create(
            provider=provider,
            purposes=[
                custody.Purpose.ACCOUNTS,
                custody.Purpose.BALANCES,
                custody.Purpose.TRANSACTIONS,
                custody.Purpose.PAYMENTS,
                custody.Purpose.SIGNING,
            ],
            expire_time=datetime.now(UTC) + timedelta(days=90),
            redirect_uri=f"http://127.0.0.1:{port}/callback",
            psu_context=custody.PsuContext(ip_address="192.0.2.44"),
        )
        say(f"asked for a consent: {pending.consent.name}, {pending.consent.state}")
        say(f"OPEN {pending.authorisation_uri}")
        redirected_to = callback.wait()
    consent = client.consents.complete(pending.consent.name, redirected_to)
    say(f"the person approved: {consent.name} is {consent.state}")
    return consent


def read_accounts(client: custody.Client, consent: custody.Consent) -> custody.Account:
    """Accounts, balances and the last month's transactions."""
    accounts = client.accounts.list(consent.name)
    for account in accounts:
        balances = client.accounts.balances(consent.name, account.name)
        month_ago = datetime.now(UTC).date() - timedelta(days=30)
        transactions = list(client.accounts.transactions(consent.name, account.name, date_from=month_ago))
        amounts = ", ".join(f"{balance.kind} {balance.amount}" for balance in balances)
        say(f"account {account.name}: {amounts}; {len(transactions)} transactions in 30 days")
    return accounts[0]


def pay_invoice(client: custody.Client, consent: custody.Consent, account: custody.Account) -> custody.Payment:
    """Pays once, follows the payment to its end, and asks again as an application does that lost the answer."""
    request_id = str(uuid.uuid4())  # stored with the order before the call, so that a repeat is the same payment

    def initiate() -> custody.Payment:
        return client.payments.initiate(
            consent.name,
            amount=custody.Money("49.90", "EUR"),
            debtor_account=account.iban,
            creditor_account="DE75512108001245126199",
            creditor_name="Wholesale Ltd",
            remittance_information=f"Invoice {INVOICE}",
            end_to_end_id=request_id.replace("-", "")[:35],
            request_id=request_id,
        )

    payment = initiate()
    say(f"payment {payment.name}: {payment.state} (the bank says {payment.provider_status})")
    final = client.payments.wait(payment.name, timeout_seconds=30)
    say(f"payment {final.name}: {final.state} (the bank says {final.provider_status})")
    again = initiate()
    if again.name != payment.name:
        raise SystemExit("the repeat made another payment")
    say(f"the same request id again: the same payment {again.name}, {again.state}")
    return final


class _Callback:
    """Waits for the person's browser at the redirect URI."""

    def __init__(self, port: int) -> None:
        self._address: list[str] = []
        addresses = self._address

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if urlsplit(self.path).path != "/callback":
                    self.send_error(404)
                    return
                addresses.append(f"http://127.0.0.1:{port}{self.path}")
                body = b"Thank you. You can close this page.\n"
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
                """The redirect's parameters belong into no log."""

        self._server = http.server.HTTPServer(("127.0.0.1", port), Handler)

    def __enter__(self) -> "_Callback":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.server_close()

    def wait(self, *, seconds: float = 600.0) -> str:
        """The address that the browser was sent to."""
        self._server.timeout = seconds
        while not self._address:
            self._server.handle_request()
        return self._address[0]


def say(line: str) -> None:
    print(line, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Asks for a consent and pays an invoice with it.")
    parser.add_argument("--address", required=True)
    parser.add_argument("--provider", default="providers/sandbox-bank")
    parser.add_argument("--redirect-port", type=int, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
