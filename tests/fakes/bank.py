"""A bank in memory: OAuth with rotating tokens, and the Berlin Group resources that the sidecar uses. Its books are the oracle of
tests: `executed` says how often each payment really moved money.

`script` holds, first in first out, what happens to the next requests of a kind instead of, or after, the ordinary answer:
an outcome that is given as it is (the bank never sees the request), or a function of the ordinary answer (the bank has acted).
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from urllib.parse import parse_qs, urlsplit

from sidecar.domain.provider import Answer, SendOutcome, Unknown
from tests.fakes.clock import FakeClock
from tests.fakes.egress import BankRequest

__all__ = ["API", "ISSUER", "TOKENS", "ScriptedBank", "lost", "variables"]

ISSUER = "https://issuer.bank.example:443"
TOKENS = "https://tokens.bank.example:443"
API = "https://api.bank.example:443"
JSON = ("content-type", "application/json")
IBAN = "DE40100100103307118608"

Twist = SendOutcome | Callable[[Answer], SendOutcome]


def variables() -> dict[str, str]:
    """What the catalog's descriptors of the sandbox bank need to speak to this one."""
    return {
        "api_uri": API.removesuffix(":443"),
        "issuer": ISSUER.removesuffix(":443"),
        "authorization_endpoint": f"{ISSUER.removesuffix(':443')}/authorize",
        "pushed_authorization_request_endpoint": f"{TOKENS}/par",
        "token_endpoint": f"{TOKENS}/token",
        "revocation_endpoint": f"{TOKENS}/revoke",
        "client_id": "PSDDE-BAFIN-123456",
        "redirect_uri": "https://app.example/callback",
    }


def lost(_answer: Answer) -> SendOutcome:
    """The bank has acted, and its answer never arrives."""
    return Unknown(code="ANSWER_TRUNCATED")


@dataclass(slots=True, kw_only=True)
class BankPayment:
    id: str
    body: dict[str, object]
    status: str = "ACSC"

    @property
    def reference(self) -> object:
        return self.body.get("instructionIdentification")


@dataclass(slots=True, kw_only=True)
class ScriptedBank:
    """`window_seconds` of an idempotency key; None for a bank that knows no such keys."""

    clock: FakeClock
    window_seconds: float | None = None
    initial_status: str = "ACSC"
    with_redirect: bool = False
    token_seconds: int | None = 600
    rotates: bool = True
    rotation: str = "strict"  # or "grace" with grace_seconds, or "when-first-used"; not where it does not rotate
    grace_seconds: float = 0.0
    script: dict[str, list[Twist]] = field(default_factory=lambda: defaultdict(list))
    requests: list[BankRequest] = field(default_factory=list)
    payments: dict[str, BankPayment] = field(default_factory=dict)
    executed: Counter[str] = field(default_factory=Counter)  # by end-to-end id
    consents: dict[str, str] = field(default_factory=dict)
    codes: dict[str, bool] = field(default_factory=dict)  # whether it was exchanged
    refreshes: int = 0
    rotations: int = 0
    reuses: int = 0  # how often the bank took a refresh token for stolen, and ended everything
    _tokens: set[str] = field(default_factory=set)
    _refresh_tokens: dict[str, float | None] = field(
        default_factory=dict
    )  # when it was used; those that are gone are unknown
    _replaced: dict[str, str] = field(default_factory=dict)  # by a token of the new pair, what its first use ends
    _keys: dict[str, tuple[float, str]] = field(default_factory=dict)
    _count: int = 0

    def __call__(self, request: BankRequest) -> SendOutcome:
        self.requests.append(request)
        kind = self.kind(request)
        twist = self.script[kind].pop(0) if self.script[kind] else None
        if twist is not None and not callable(twist):
            return twist
        answer = self._ordinary(kind, request)
        echo = request.headers.get("x-request-id")
        if echo:
            answer = replace(answer, headers=(*answer.headers, ("x-request-id", echo)))
        return twist(answer) if twist is not None else answer

    def count(self, kind: str) -> int:
        return sum(self.kind(request) == kind for request in self.requests)

    @staticmethod
    def kind(request: BankRequest) -> str:
        path = urlsplit(request.target).path
        if request.origin == TOKENS:
            return path.strip("/")
        parts = path.removeprefix("/v1/").split("/")
        if parts[0] == "payments":
            if request.method == "POST":
                return "initiate"
            return "status" if parts[-1] == "status" else "lookup"
        if parts[0] == "consents":
            return {"POST": "register", "GET": "details", "DELETE": "end"}[request.method]
        return parts[2] if len(parts) == 3 else "accounts"

    # -- what tests do at the bank

    def authorise(self, code: str = "code-1") -> str:
        self.codes[code] = False
        return code

    def mint(self) -> tuple[str, str]:
        """A pair of tokens, as the platform may have got it elsewhere."""
        self._count += 1
        access, refresh = f"access-token-{self._count:04d}", f"refresh-token-{self._count:04d}"
        self._tokens.add(access)
        self._refresh_tokens[refresh] = None
        return access, refresh

    def expire_tokens(self) -> None:
        self._tokens.clear()

    # -- the resources

    def _ordinary(self, kind: str, request: BankRequest) -> Answer:
        if kind in ("initiate", "status", "lookup", "details", "end", "accounts", "balances", "transactions"):
            token = request.headers.get("authorization", "").removeprefix("Bearer ")
            if token not in self._tokens:
                return error(401, "TOKEN_EXPIRED")
            self._note_use(token)
        handler: Callable[[BankRequest], Answer] = getattr(self, f"_{kind}")
        return handler(request)

    def _par(self, request: BankRequest) -> Answer:
        return answer(201, {"request_uri": "urn:ietf:params:oauth:request_uri:1", "expires_in": 60})

    def _token(self, request: BankRequest) -> Answer:
        form = {name: values[0] for name, values in parse_qs(request.body.decode()).items()}
        if form["grant_type"] == "authorization_code":
            if self.codes.get(form["code"], True):
                return answer(400, {"error": "invalid_grant"})
            self.codes[form["code"]] = True
            return self._granted(*self.mint())
        self.refreshes += 1
        return self._refreshed(form["refresh_token"])

    def _refreshed(self, token: str) -> Answer:
        self._note_use(token)
        now = self.clock.boot_time_ns() / 1e9
        used = self._refresh_tokens.get(token, 0.0)
        in_grace = used is not None and self.rotation == "grace" and now - used <= self.grace_seconds
        if token not in self._refresh_tokens or (used is not None and not in_grace):
            self.reuses += token in self._refresh_tokens
            self._refresh_tokens.clear()  # reuse detection: the whole family goes, and what it gave with it
            self._tokens.clear()
            return answer(400, {"error": "invalid_grant"})
        access, refresh = self.mint()
        if not self.rotates:
            del self._refresh_tokens[refresh]
            return self._granted(access, None)
        self.rotations += 1
        if self.rotation == "when-first-used":
            self._replaced |= {access: token, refresh: token}
        elif used is None:
            self._refresh_tokens[token] = now
        return self._granted(access, refresh)

    def _note_use(self, token: str) -> None:
        """The first use of a new pair ends the old refresh token, where that is how the bank rotates."""
        old = self._replaced.pop(token, None)
        if old in self._refresh_tokens:
            self._refresh_tokens[old] = 0.0

    def _granted(self, access: str, refresh: str | None) -> Answer:
        document: dict[str, object] = {"access_token": access, "token_type": "Bearer"}
        if self.token_seconds is not None:
            document["expires_in"] = self.token_seconds
        return answer(200, {**document, **({"refresh_token": refresh} if refresh else {})})

    def _revoke(self, request: BankRequest) -> Answer:
        return answer(200, {"revoked": True})

    def _register(self, request: BankRequest) -> Answer:
        identifier = f"bank-consent-{len(self.consents) + 1}"
        self.consents[identifier] = "valid"
        return answer(201, {"consentStatus": "received", "consentId": identifier, "_links": {}})

    def _details(self, request: BankRequest) -> Answer:
        access = {"accounts": [{"iban": IBAN, "currency": "EUR"}]}
        return answer(200, {"access": access, "consentStatus": "valid"})

    def _end(self, request: BankRequest) -> Answer:
        self.consents[request.target.rpartition("/")[2]] = "terminatedByTpp"
        return Answer(status=204, headers=(), body=b"")

    def _initiate(self, request: BankRequest) -> Answer:
        key = request.headers.get("idempotency-key")
        now = self.clock.boot_time_ns() / 1e9
        if self.window_seconds is not None and key in self._keys:
            since, payment_id = self._keys[key]
            if now - since <= self.window_seconds:
                return self._created(self.payments[payment_id])
        body = json.loads(request.body)
        payment = BankPayment(id=f"bank-payment-{len(self.payments) + 1}", body=body, status=self.initial_status)
        self.payments[payment.id] = payment
        if key:
            self._keys[key] = (now, payment.id)
        if payment.status != "RJCT":
            self.executed[body.get("endToEndIdentification", "")] += 1
        return self._created(payment)

    def _created(self, payment: BankPayment) -> Answer:
        links: dict[str, object] = {"status": {"href": f"/v1/payments/x/{payment.id}/status"}}
        if self.with_redirect:
            links["scaRedirect"] = {"href": f"{ISSUER.removesuffix(':443')}/approve/{payment.id}"}
        return answer(201, {"transactionStatus": payment.status, "paymentId": payment.id, "_links": links})

    def _status(self, request: BankRequest) -> Answer:
        payment = self.payments.get(request.target.split("/")[-2])
        return answer(200, {"transactionStatus": payment.status}) if payment else error(404, "RESOURCE_UNKNOWN")

    def _lookup(self, request: BankRequest) -> Answer:
        """What has this reference, once the bank shows it."""
        (reference,) = parse_qs(urlsplit(request.target).query)["instructionIdentification"]
        found = [payment for payment in self.payments.values() if payment.reference == reference]
        return answer(200, {"payments": [self._listed(payment) for payment in found]})

    @staticmethod
    def _listed(payment: BankPayment) -> dict[str, object]:
        references = {"instructionIdentification": payment.reference}
        return {"paymentId": payment.id, "transactionStatus": payment.status, **references}

    def _accounts(self, request: BankRequest) -> Answer:
        mine = {"resourceId": "acc-1", "iban": IBAN, "currency": "EUR"}
        other = {"resourceId": "acc-2", "iban": "DE02120300000000202051", "currency": "EUR"}
        return answer(200, {"accounts": [mine, other]})

    def _balances(self, request: BankRequest) -> Answer:
        amount = {"currency": "EUR", "amount": "-12.50"}
        return answer(200, {"balances": [{"balanceType": "closingBooked", "balanceAmount": amount}]})

    def _transactions(self, request: BankRequest) -> Answer:
        line = {"transactionId": "t-1", "transactionAmount": {"currency": "EUR", "amount": "-1.00"}}
        report: dict[str, object] = {"booked": [line]}
        if "pageId" not in request.target:
            report["_links"] = {"next": {"href": f"{urlsplit(request.target).path}?bookingStatus=both&pageId=a:2"}}
        return answer(200, {"transactions": report})


def answer(status: int, document: object) -> Answer:
    return Answer(status=status, headers=(JSON,), body=json.dumps(document).encode())


def error(status: int, code: str) -> Answer:
    return answer(status, {"tppMessages": [{"category": "ERROR", "code": code}]})
