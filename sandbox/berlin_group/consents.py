"""Consents: create, read, status, delete.

Rules this module keeps:
- A client sees its own consents only. A token is not needed here, but one that is sent must fit.
"""

import datetime

from sandbox import pki
from sandbox.berlin_group.callers import Callers, must_have_role
from sandbox.berlin_group.fields import Refusal, boolean, date, iban, json_body, psu_ip
from sandbox.books import iso_date
from sandbox.consents import RIGHTS, Consent, Consents, granted_access
from sandbox.directory import Client
from sandbox.oauth import AuthorizationServer
from sandbox.web import Addresses, Answer, Call, Clock, json_answer

_CONSENT_DAYS = 180


class ConsentEndpoints:
    """`/v1/consents`."""

    def __init__(
        self,
        *,
        clock: Clock,
        consents: Consents,
        oauth: AuthorizationServer,
        callers: Callers,
        addresses: Addresses,
    ) -> None:
        self._clock = clock
        self._consents = consents
        self._oauth = oauth
        self._callers = callers
        self._addresses = addresses

    def create(self, call: Call, client: Client) -> Answer:
        """Take up a consent."""
        must_have_role(call, pki.ROLE_ACCOUNTS)
        psu_ip(call, required=True)
        body = json_body(call)
        valid_until = _valid_until(body.get("validUntil"), self._clock())
        per_day = body.get("frequencyPerDay")
        if not isinstance(per_day, int) or isinstance(per_day, bool) or per_day < 1:
            raise Refusal(400, "FORMAT_ERROR", "frequencyPerDay must be a whole number of at least 1")
        recurring = boolean(body, "recurringIndicator")
        boolean(body, "combinedServiceIndicator")
        if not recurring and per_day != 1:
            raise Refusal(400, "FORMAT_ERROR", "frequencyPerDay of a one-off consent must be 1")
        access = _access(body.get("access"))
        consent = self._consents.create(
            client_id=client.client_id, access=access, recurring=recurring, valid_until=valid_until, per_day=per_day
        )
        path = f"/v1/consents/{consent.consent_id}"
        document = {
            "consentStatus": "received",
            "consentId": consent.consent_id,
            "_links": {
                "scaOAuth": {"href": f"{self._addresses.issuer}/.well-known/oauth-authorization-server"},
                "self": {"href": path},
                "status": {"href": f"{path}/status"},
            },
        }
        headers = {
            "Location": self._addresses.api + path,
            "ASPSP-SCA-Approach": "REDIRECT",
            "ASPSP-Multiple-Consent-Support": "true",
        }
        return json_answer(201, document, headers)

    def read_or_end(self, call: Call, client: Client, consent_id: str) -> Answer:
        """Show a consent (GET) or end it (DELETE)."""
        consent, status = self._own_consent(call, client, consent_id)
        if call.method == "DELETE":
            self._consents.terminate(consent)
            self._oauth.revoke_consent(consent)
            return Answer(status=204)
        document = {
            "access": granted_access(consent),
            "recurringIndicator": consent.recurring,
            "validUntil": consent.valid_until.isoformat(),
            "frequencyPerDay": consent.frequency_per_day,
            "lastActionDate": iso_date(consent.last_action),
            "consentStatus": status,
        }
        return json_answer(200, document)

    def status(self, call: Call, client: Client, consent_id: str) -> Answer:
        """Tell a consent's state."""
        return json_answer(200, {"consentStatus": self._own_consent(call, client, consent_id)[1]})

    def _own_consent(self, call: Call, client: Client, consent_id: str) -> tuple[Consent, str]:
        """Return a client's consent; a token is not needed, but one that is sent must fit."""
        if call.headers.get("authorization"):
            self._callers.grant(call, client)
        consent = self._consents.get(consent_id, client.client_id)
        if consent is None:
            raise Refusal(403, "CONSENT_UNKNOWN", "this consent is not known")
        return consent, consent.status(self._clock())


def _valid_until(value: object, now: float) -> datetime.date:
    """Read validUntil; a date further ahead than the bank gives is brought down to what it gives."""
    asked = date(value, "validUntil")
    today = datetime.datetime.fromtimestamp(now, datetime.UTC).date()
    if asked < today:
        raise Refusal(400, "PERIOD_INVALID", "validUntil is in the past")
    return min(asked, today + datetime.timedelta(days=_CONSENT_DAYS))


def _access(value: object) -> dict[str, object]:
    """Check the `access` member: one global form, or lists of account references by IBAN."""
    if not isinstance(value, dict) or not value:
        raise Refusal(400, "FORMAT_ERROR", "access is required")
    names = set(value)
    if names <= set(RIGHTS):
        for references in value.values():
            if not isinstance(references, list):
                raise Refusal(400, "FORMAT_ERROR", "access must list account references")
            for reference in references:
                iban({"account": reference}, "account")
        return value
    if len(names) == 1 and names <= {"availableAccounts", "availableAccountsWithBalance", "allPsd2"}:
        if next(iter(value.values())) in ("allAccounts", "allAccountsWithOwnerName"):
            return value
        raise Refusal(400, "FORMAT_ERROR", "a global access must be allAccounts or allAccountsWithOwnerName")
    raise Refusal(400, "PARAMETER_NOT_SUPPORTED", "this combination of access members is not offered")
