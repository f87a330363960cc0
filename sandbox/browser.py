"""What the person meets: the authorization endpoint, and the approval of a payment, as pages in a browser.

Rules this module keeps:
- An interaction belongs to one browser (a cookie) and its forms carry a token of their own (RFC 9700 section 4.7).
- The redirect goes only to the address that the pushed request was checked for, with code, state and iss (RFC 9207).
- Three wrong PINs, or a no, end the interaction; a decision is taken once.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlencode, urlsplit

from sandbox import pages
from sandbox.books import Account, Books, format_cents
from sandbox.oauth import AuthorizationServer, OAuthError, PushedRequest
from sandbox.payments import Payment, Payments
from sandbox.web import Answer, Call, Clock, parse_form, parse_parameters

_COOKIE = "__Host-interaction"
_INTERACTION_SECONDS = 600
_MAX_WRONG_PINS = 3
_RIGHTS_IN_WORDS = {
    "accounts": "read the list of accounts",
    "balances": "read balances",
    "transactions": "read transactions",
}


@dataclass(slots=True, kw_only=True)
class _Interaction:
    interaction_id: str
    cookie: str
    csrf: str
    expires_at: float
    request: PushedRequest | None = None
    payment: Payment | None = None
    person_id: str | None = None
    wrong_pins: int = 0

    @property
    def origin(self) -> str:
        if self.request is not None:
            return pages.origin_of(self.request.redirect_uri)
        return pages.origin_of(self.payment.instruction.redirect_uri if self.payment else None)


class Browser:
    """The bank's pages and what their forms do."""

    def __init__(
        self, *, clock: Clock, issuer: str, books: Books, server: AuthorizationServer, payments: Payments
    ) -> None:
        self._clock = clock
        self._issuer = issuer
        self._books = books
        self._server = server
        self._payments = payments
        self._interactions: dict[str, _Interaction] = {}

    def answer(self, call: Call) -> Answer:
        """Answer one request of a browser."""
        try:
            match call.method, call.path.strip("/").split("/"):
                case "GET", ["oauth", "authorize"]:
                    return self._authorize(call)
                case "GET", ["sca", approval_id]:
                    return self._approve_payment(approval_id)
                case "GET", ["interaction", interaction_id]:
                    return self._show(self._interaction(call, interaction_id))
                case "POST", ["interaction", interaction_id, "login"]:
                    return self._log_in(*self._posted(call, interaction_id))
                case "POST", ["interaction", interaction_id, "decision"]:
                    return self._decide(*self._posted(call, interaction_id))
        except OAuthError as error:
            return pages.message_page("This link does not work", error.description, status=error.status)
        except ValueError:
            return pages.message_page("This link does not work", "The request is not well formed.", status=400)
        return pages.message_page("Not found", "There is nothing at this address.", status=404)

    def _authorize(self, call: Call) -> Answer:
        parameters = parse_parameters(call.query)
        if "request_uri" not in parameters:
            raise OAuthError("invalid_request", "A pushed authorization request is required (RFC 9126).")
        request = self._server.begin(parameters.get("client_id", ""), parameters["request_uri"])
        return self._start(request=request)

    def _approve_payment(self, approval_id: str) -> Answer:
        payment = self._payments.to_approve(approval_id)
        if payment is None:
            raise OAuthError("invalid_request", "There is no payment to approve here, or it was decided before.")
        return self._start(payment=payment)

    def _start(self, *, request: PushedRequest | None = None, payment: Payment | None = None) -> Answer:
        """Begin an interaction at an address that survives a reload (the link that led here may be good only once)."""
        self._forget_old()
        interaction = _Interaction(
            interaction_id=secrets.token_urlsafe(16),
            cookie=secrets.token_urlsafe(16),
            csrf=secrets.token_urlsafe(16),
            expires_at=self._clock() + _INTERACTION_SECONDS,
            request=request,
            payment=payment,
        )
        self._interactions[interaction.interaction_id] = interaction
        cookie = f"{_COOKIE}={interaction.cookie}; Path=/; Secure; HttpOnly; SameSite=Lax"
        headers = {"Location": f"/interaction/{interaction.interaction_id}", "Set-Cookie": cookie}
        return Answer(status=303, headers=headers)

    def _interaction(self, call: Call, interaction_id: str) -> _Interaction:
        interaction = self._interactions.get(interaction_id)
        if interaction is None or interaction.expires_at < self._clock():
            raise OAuthError("invalid_request", "This page has ended. Go back to the platform and start again.")
        if not _same(_cookie(call), interaction.cookie):
            raise OAuthError("access_denied", "This page belongs to another browser.", status=403)
        return interaction

    def _posted(self, call: Call, interaction_id: str) -> tuple[_Interaction, Mapping[str, Sequence[str]]]:
        interaction = self._interaction(call, interaction_id)
        form = parse_form(call.body)
        if not _same(_one(form, "csrf"), interaction.csrf):
            raise OAuthError("access_denied", "This form does not come from the bank's page.", status=403)
        return interaction, form

    def _log_in(self, interaction: _Interaction, form: Mapping[str, Sequence[str]]) -> Answer:
        person = self._books.persons.get(_one(form, "person"))
        if person is None or not _same(_one(form, "pin"), person.pin):
            interaction.wrong_pins += 1
            if interaction.wrong_pins >= _MAX_WRONG_PINS:
                return self._finish(interaction, self._refuse(interaction, "three wrong PINs"))
            return self._show(interaction, problem="Person and PIN do not fit.")
        interaction.person_id = person.person_id
        return Answer(status=303, headers={"Location": f"/interaction/{interaction.interaction_id}"})

    def _show(self, interaction: _Interaction, *, problem: str | None = None) -> Answer:
        action = f"/interaction/{interaction.interaction_id}"
        if interaction.person_id is None:
            asks = "A platform asks for access to your accounts." if interaction.request else "A payment waits for you."
            persons = list(self._books.persons.values())
            return pages.login_page(
                f"{action}/login", interaction.csrf, persons, asks=asks, problem=problem, origin=interaction.origin
            )
        if interaction.request is not None:
            return pages.consent_page(
                f"{action}/decision",
                interaction.csrf,
                self._choosable(interaction.request, interaction.person_id),
                asks=_wishes(interaction.request),
                problem=problem,
                origin=interaction.origin,
            )
        assert interaction.payment is not None
        facts = _facts(interaction.payment)
        return pages.payment_page(
            f"{action}/decision", interaction.csrf, facts, problem=problem, origin=interaction.origin
        )

    def _decide(self, interaction: _Interaction, form: Mapping[str, Sequence[str]]) -> Answer:
        if interaction.person_id is None:
            return self._show(interaction, problem="Log in first.")
        decision = _one(form, "decision")
        if decision == "deny":
            return self._finish(interaction, self._refuse(interaction, "the customer said no"))
        if decision != "approve":
            return self._show(interaction, problem="Choose Approve or Deny.")
        if interaction.request is not None:
            return self._give(interaction, interaction.request, interaction.person_id, form.get("account", ()))
        assert interaction.payment is not None
        return self._pay(interaction, interaction.payment, interaction.person_id)

    def _give(self, interaction: _Interaction, request: PushedRequest, person_id: str, ticked: Sequence[str]) -> Answer:
        choosable = {account.iban for account in self._choosable(request, person_id)}
        ibans = tuple(dict.fromkeys(ticked))
        if not ibans or not set(ibans) <= choosable:
            return self._show(interaction, problem="Tick at least one of your accounts, or choose Deny.")
        code = self._server.approve(request, person_id, ibans)
        return self._finish(interaction, _redirect(request.redirect_uri, self._answer_of(request, {"code": code})))

    def _pay(self, interaction: _Interaction, payment: Payment, person_id: str) -> Answer:
        if payment.instruction.person_id != person_id:
            return self._show(interaction, problem="This payment is from another customer's account.")
        self._payments.approve(payment)
        back = payment.instruction.redirect_uri
        return self._finish(interaction, _redirect(back, {}) if back else _goodbye("The payment is approved."))

    def _refuse(self, interaction: _Interaction, reason: str) -> Answer:
        if interaction.request is not None:
            self._server.deny(interaction.request)
            error = self._answer_of(interaction.request, {"error": "access_denied", "error_description": reason})
            return _redirect(interaction.request.redirect_uri, error)
        assert interaction.payment is not None
        self._payments.reject(interaction.payment, reason)
        back = interaction.payment.instruction.nok_redirect_uri or interaction.payment.instruction.redirect_uri
        return _redirect(back, {}) if back else _goodbye("The payment is refused.")

    def _finish(self, interaction: _Interaction, answer: Answer) -> Answer:
        del self._interactions[interaction.interaction_id]
        return answer

    def _answer_of(self, request: PushedRequest, values: Mapping[str, str]) -> dict[str, str]:
        state = {} if request.state is None else {"state": request.state}
        return {**values, **state, "iss": self._issuer}

    def _choosable(self, request: PushedRequest, person_id: str) -> list[Account]:
        """Return the person's accounts that the request allows to tick."""
        accounts = self._books.accounts_of(person_id)
        listed = request.consent.rights_asked()["accounts"] if request.consent is not None else ()
        return [account for account in accounts if not listed or account.iban in listed]

    def _forget_old(self) -> None:
        now = self._clock()
        for interaction_id in [key for key, value in self._interactions.items() if value.expires_at < now]:
            del self._interactions[interaction_id]


def _wishes(request: PushedRequest) -> list[str]:
    wishes = []
    if request.consent is not None:
        rights = request.consent.rights_asked()
        wishes = [
            f"{request.client.name} wants to {words}." for right, words in _RIGHTS_IN_WORDS.items() if right in rights
        ]
        wishes.append(f"This holds until {request.consent.valid_until.isoformat()}, or until you end it.")
    if request.payments:
        wishes.append(f"{request.client.name} wants to start payments of up to 500.00 EUR each from these accounts.")
    return wishes


def _facts(payment: Payment) -> list[tuple[str, str]]:
    order = payment.instruction
    facts = [
        ("Amount", f"{format_cents(order.amount_cents)} EUR"),
        ("To", f"{order.creditor_name}, {order.creditor_iban}"),
        ("From", order.debtor_iban),
    ]
    return [*facts, ("Text", order.remittance)] if order.remittance else facts


def _goodbye(text: str) -> Answer:
    return pages.message_page("Done", f"{text} You may close this window.")


def _redirect(uri: str, values: Mapping[str, str]) -> Answer:
    parts = urlsplit(uri)
    query = "&".join(part for part in (parts.query, urlencode(values)) if part)
    return Answer(status=303, headers={"Location": parts._replace(query=query).geturl(), "Cache-Control": "no-store"})


def _cookie(call: Call) -> str:
    try:
        morsel = SimpleCookie("; ".join(call.headers.get("cookie", ()))).get(_COOKIE)
    except CookieError:
        return ""
    return morsel.value if morsel is not None else ""


def _same(one: str, other: str) -> bool:
    return secrets.compare_digest(one.encode(), other.encode())


def _one(form: Mapping[str, Sequence[str]], name: str) -> str:
    values = form.get(name, ())
    return values[0] if len(values) == 1 else ""
