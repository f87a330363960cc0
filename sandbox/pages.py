"""The bank's pages: login, consent, payment approval. Plain HTML that works without script.

Rules this module keeps:
- Every value is escaped; no script, no outside resource; a page may not be framed (RFC 9700 section 4.16).
- Each input has a label, each page a heading and a language; errors are announced.
"""

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from urllib.parse import urlsplit

from sandbox.books import Account, Person, format_cents
from sandbox.web import Answer

_STYLE = (
    "body{font:1.1rem/1.5 system-ui,sans-serif;max-width:34rem;margin:2rem auto;padding:0 1rem;color:#1b1f24;background:#fff}"
    "h1{font-size:1.5rem}fieldset{border:1px solid #8a939e;border-radius:.4rem;margin:1rem 0}"
    "label{display:block;margin:.5rem 0}button{font:inherit;padding:.5rem 1.2rem;margin-right:.6rem}"
    "dt{font-weight:600}.alert{border-left:.3rem solid #b00020;padding-left:.8rem}"
    "input,select{font:inherit;padding:.2rem}"
)
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()


def login_page(
    action: str, csrf: str, persons: Sequence[Person], *, asks: str, problem: str | None, origin: str
) -> Answer:
    """Ask who is there."""
    options = "".join(f'<option value="{escape(p.person_id)}">{escape(p.name)}</option>' for p in persons)
    body = (
        f"<p>{escape(asks)}</p>"
        f'<form method="post" action="{escape(action)}">{_csrf(csrf)}'
        f'<label for="person">Who are you?</label><select id="person" name="person">{options}</select>'
        '<label for="pin">PIN (every demo person has 1234)</label>'
        '<input id="pin" name="pin" type="password" autocomplete="off" required>'
        '<p><button type="submit">Log in</button></p></form>'
    )
    return page("Log in", body, problem=problem, origin=origin)


def consent_page(
    action: str, csrf: str, accounts: Sequence[Account], *, asks: Sequence[str], problem: str | None, origin: str
) -> Answer:
    """Ask for a yes or no, and for which accounts."""
    ticks = "".join(
        f'<label for="a{number}"><input id="a{number}" type="checkbox" name="account" value="{escape(account.iban)}" checked> '
        f"{escape(account.name)} · {escape(account.iban)} · {format_cents(account.available_cents)} EUR</label>"
        for number, account in enumerate(accounts)
    )
    wishes = "".join(f"<li>{escape(wish)}</li>" for wish in asks)
    body = (
        f"<ul>{wishes}</ul>"
        f'<form method="post" action="{escape(action)}">{_csrf(csrf)}'
        f"<fieldset><legend>For these accounts</legend>{ticks}</fieldset>{_BUTTONS}</form>"
    )
    return page("Give access?", body, problem=problem, origin=origin)


def payment_page(
    action: str, csrf: str, facts: Sequence[tuple[str, str]], *, problem: str | None, origin: str
) -> Answer:
    """Show amount and payee (RTS article 5, dynamic linking), and ask for a yes or no."""
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts)
    body = f'<dl>{rows}</dl><form method="post" action="{escape(action)}">{_csrf(csrf)}{_BUTTONS}</form>'
    return page("Approve this payment?", body, problem=problem, origin=origin)


def message_page(title: str, text: str, *, status: int = 200) -> Answer:
    """Say something final."""
    return page(title, f"<p>{escape(text)}</p>", status=status)


def page(title: str, body: str, *, problem: str | None = None, origin: str = "", status: int = 200) -> Answer:
    """Build a page; `origin` is where its form's answer may redirect to (browsers apply form-action to that too)."""
    alert = f'<p class="alert" role="alert">{escape(problem)}</p>' if problem else ""
    html = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)} - Sandbox Bank</title><style>{_STYLE}</style></head>"
        f"<body><main><p>Sandbox Bank (no real money)</p><h1>{escape(title)}</h1>{alert}{body}</main></body></html>"
    )
    policy = (
        f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; form-action 'self' {origin}; frame-ancestors 'none'"
    )
    headers = {"Content-Security-Policy": policy.strip(), "Cache-Control": "no-store", "Referrer-Policy": "no-referrer"}
    return Answer(status=status, body=html.encode(), content_type="text/html; charset=utf-8", headers=headers)


def origin_of(uri: str | None) -> str:
    """Return scheme, host and port of an address, for the content security policy."""
    if uri is None:
        return ""
    parts = urlsplit(uri)
    return f"{parts.scheme}://{parts.netloc}"


_BUTTONS = (
    '<p><button type="submit" name="decision" value="approve">Approve</button>'
    '<button type="submit" name="decision" value="deny">Deny</button></p>'
)


def _csrf(value: str) -> str:
    return f'<input type="hidden" name="csrf" value="{escape(value)}">'
