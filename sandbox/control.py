"""The control listener: plain HTTP on loopback, for tests and for the proof that a demonstration gives.

    GET  /control/ledger     what the bank executed; ?end_to_end_id= narrows it
    GET  /control/requests   which requests reached the interface for providers (method, path, X-Request-ID, status)
    GET  /control/faults     faults that are still to strike;  POST sets one;  DELETE clears them
    POST /control/reset      the books and everything else as at the start

Rules this module keeps:
- It shows no token, code, cookie or key, and there is no address that would.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from sandbox.books import Books, Entry, format_cents, iso_time
from sandbox.faults import Fault, FaultInvalid, Faults
from sandbox.web import Answer, Call, json_answer, parse_json_object, parse_parameters


@dataclass(slots=True, kw_only=True)
class Seen:
    """One request that reached the interface for providers; `status` is None while it has no whole answer."""

    method: str
    path: str
    x_request_id: str | None
    fault: str | None
    status: int | None = None


def control_answer(call: Call, *, books: Books, faults: Faults, seen: Iterable[Seen]) -> Answer | None:
    """Answer one control request; None stands for a reset, which only the caller can do."""
    try:
        match call.method, call.path:
            case "GET", "/control/ledger":
                return _ledger(books, parse_parameters(call.query).get("end_to_end_id"))
            case "GET", "/control/requests":
                return json_answer(200, {"requests": [_seen(request) for request in seen]})
            case "GET", "/control/faults":
                return json_answer(200, {"faults": faults.pending(), "kinds": dict(Fault.KINDS)})
            case "POST", "/control/faults":
                faults.add(parse_json_object(call.body))
                return json_answer(201, {"faults": faults.pending()})
            case "DELETE", "/control/faults":
                faults.clear()
                return Answer(status=204)
            case "POST", "/control/reset":
                return None
    except (FaultInvalid, ValueError) as error:
        return json_answer(400, {"error": str(error)})
    return json_answer(404, {"error": "there is nothing at this address"})


def _ledger(books: Books, end_to_end_id: str | None) -> Answer:
    entries = [entry for entry in books.ledger if end_to_end_id is None or entry.end_to_end_id == end_to_end_id]
    return json_answer(200, {"count": len(entries), "entries": [_entry(entry) for entry in entries]})


def _entry(entry: Entry) -> dict[str, object]:
    return {
        "sequence": entry.sequence,
        "payment_id": entry.payment_id,
        "product": entry.product,
        "end_to_end_id": entry.end_to_end_id,
        "amount": format_cents(entry.amount_cents),
        "currency": "EUR",
        "debtor_iban": entry.debtor_iban,
        "creditor_iban": entry.creditor_iban,
        "creditor_name": entry.creditor_name,
        "remittance": entry.remittance,
        "executed_at": iso_time(entry.executed_at),
        "x_request_id": entry.x_request_id,
        "idempotency_key": entry.idempotency_key,
        "client_id": entry.client_id,
    }


def _seen(request: Seen) -> dict[str, object]:
    return {
        "method": request.method,
        "path": request.path,
        "x_request_id": request.x_request_id,
        "status": request.status,
        "fault": request.fault,
    }
