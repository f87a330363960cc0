"""From a rendered request to a signed one, and from a provider's problem to an error of ours."""

import secrets
import uuid

from sidecar.connectors.base import Problem, ProblemKind, UnsignedRequest
from sidecar.domain.provider import Answer, NotSent, ProviderRequest, SendOutcome
from sidecar.errors import CustodyError, Exhausted, NotFound, PreconditionFailed, Unavailable
from sidecar.ports import Hsm

__all__ = ["answer_of", "new_assertion_id", "new_call_id", "problem_error", "refused_or", "sign_request"]


async def sign_request(hsm: Hsm, unsigned: UnsignedRequest) -> ProviderRequest:
    if not unsigned.signing_input:
        return unsigned.request
    return unsigned.signed(await hsm.sign(unsigned.key, unsigned.digest))


def new_call_id() -> str:
    """For X-Request-ID: a UUID (RFC 9562), new for each call."""
    return str(uuid.uuid4())


def new_assertion_id() -> str:
    """A `jti` that will not repeat: 128 random bits."""
    return secrets.token_urlsafe(16)


def answer_of(outcome: SendOutcome) -> Answer:
    """The answer to a call that may be repeated. Raises Unavailable where there is none."""
    if isinstance(outcome, Answer):
        return outcome
    stage = "notSent" if isinstance(outcome, NotSent) else "noAnswer"
    raise Unavailable(
        "PROVIDER_UNAVAILABLE",
        "the provider did not answer; try again",
        metadata={"stage": stage, "code": outcome.code},
    )


def problem_error(problem: Problem) -> CustodyError:
    """The error that a caller gets for a provider's problem with a read or a consent."""
    metadata = {"providerCode": problem.code} if problem.code else {}
    match problem.kind:
        case ProblemKind.TOKEN_EXPIRED | ProblemKind.UNAVAILABLE:
            return Unavailable("PROVIDER_UNAVAILABLE", "the provider cannot answer now; try again", metadata=metadata)
        case ProblemKind.CONSENT_ENDED:
            return PreconditionFailed(
                "CONSENT_NEEDS_REAUTHORISATION",
                "the provider no longer honours the consent; ask the owner for a new one",
                metadata=metadata,
            )
        case ProblemKind.ACCESS_EXCEEDED:
            return Exhausted(
                "RATE_LIMITED", "the provider allows no more accesses now", retry_after_seconds=3600, metadata=metadata
            )
        case ProblemKind.NOT_FOUND:
            return NotFound("ACCOUNT_NOT_FOUND", "the provider does not know this account", metadata=metadata)
        case ProblemKind.REFUSED:
            return PreconditionFailed("PROVIDER_REFUSED", "the provider refused the request", metadata=metadata)
        case ProblemKind.INVALID_ANSWER:
            return Unavailable(
                "PROVIDER_ANSWER_INVALID",
                "the provider's answer cannot be used",
                retry_after_seconds=30,
                metadata=metadata,
            )


def refused_or(problem: Problem) -> CustodyError:
    """As `problem_error`, for a consent that only comes into being: there is nothing yet that could be missing or have ended."""
    if problem.kind in (ProblemKind.NOT_FOUND, ProblemKind.CONSENT_ENDED):
        problem = Problem(kind=ProblemKind.REFUSED, code=problem.code)
    return problem_error(problem)
