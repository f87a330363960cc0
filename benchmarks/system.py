"""The system under measurement: a real sidecar on SoftHSM and SQLite, the light provider, and the load generators."""

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import custody
import psutil

from benchmarks.application import OWNER, balances_request, sign_request
from benchmarks.workers import Worker
from sandbox.testing import SandboxProcess
from tools.development import CLIENT_ID, Development, DevelopmentError, SidecarProcess

__all__ = ["DELAY_SECONDS", "PROVIDERS", "BenchmarkDevelopment", "System", "pss_bytes", "running_system", "work_folder"]

DELAY_SECONDS = 0.05
PROVIDERS = ("instant", "slow")
_ROOT = Path(__file__).resolve().parent.parent
_IBAN = "DE19100100100000000404"


class BenchmarkDevelopment(Development):
    """A development system whose application may also use the light provider's two ports."""

    def policy(self) -> dict[str, Any]:
        policy = Development.policy(self)
        policy["workloads"][0]["providers"] = ["sandbox-bank", *PROVIDERS]
        return policy

    def light_provider(self, bank: SandboxProcess, name: str, port: int) -> dict[str, Any]:
        origin = f"https://127.0.0.1:{port}"
        layout = bank.layout
        return {
            "id": name,
            "descriptor": "sandbox-bank",
            "ca_file": str(layout.ca_certificate),
            "client_certificate_file": str(layout.tpp_certificate),
            "client_key_file": str(layout.tpp_key),
            "allow_client_key_file": True,
            "signing_certificate_file": str(layout.signing_certificate),
            "variables": {
                "api_uri": origin,
                "issuer": origin,
                "authorization_endpoint": f"{origin}/authorize",
                "pushed_authorization_request_endpoint": f"{origin}/par",
                "token_endpoint": f"{origin}/token",
                "revocation_endpoint": f"{origin}/revoke",
                "client_id": CLIENT_ID,
                "redirect_uri": self.redirect_uri,
            },
        }


@dataclass(slots=True, kw_only=True)
class System:
    """`consents` are active ones, by provider. `sidecar` is the one that runs now."""

    development: BenchmarkDevelopment
    bank: SandboxProcess
    sidecar: SidecarProcess
    provider: Worker
    direct: Worker
    application: Worker
    echo: Worker
    client: custody.Client
    consents: Mapping[str, str]
    changes: Mapping[str, Any]

    def restart_sidecar(self) -> float:
        """A new sidecar on the same files. How many seconds from exec to ready."""
        if self.sidecar.stop() != 0:
            raise DevelopmentError(f"the sidecar did not end cleanly: {self.sidecar.last_words()}")
        began = time.monotonic()
        self.sidecar = self.development.start_sidecar(self.bank, changes=self.changes)
        ready_after_seconds = time.monotonic() - began
        self.client.wait_ready(30)
        return ready_after_seconds

    def processes(self) -> dict[str, psutil.Process]:
        """gateway, egress, hsm."""
        gateway = psutil.Process(self.sidecar.pid)
        found = {"gateway": gateway}
        for child in gateway.children():
            for name in ("egress", "hsm"):
                if f"sidecar.{name}" in child.cmdline():
                    found[name] = child
        return found

    def cpu_seconds(self) -> dict[str, float]:
        return {name: sum(process.cpu_times()[:2]) for name, process in self.processes().items()}

    def message_sizes(self, work: str) -> str:
        """How many bytes go and come in a call of this kind, for the echo: `GO:COME`."""
        consent = self.consents["instant"]
        if work == "balances":
            read = balances_request(consent)
            return f"{read.ByteSize()}:{self.client.stub.accounts.ListBalances(read).ByteSize()}"
        document = sign_request(consent)
        return f"{document.ByteSize()}:{self.client.stub.signing.Sign(document).ByteSize()}"


@contextmanager
def work_folder() -> Iterator[Path]:
    """A folder on the project's own disk: in a temporary file system an fsync would cost nothing."""
    parent = _ROOT / "var"
    parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=parent) as folder:
        yield Path(folder)


@contextmanager
def running_system(*, store: str = "sqlite", delay_seconds: float = DELAY_SECONDS) -> Iterator[System]:
    """Everything started; everything ended afterwards. `delay_seconds` is what the slow provider takes."""
    with ExitStack() as stack:
        folder = stack.enter_context(work_folder())
        development = BenchmarkDevelopment.prepare(folder, store=store)
        stack.callback(development.stop)
        bank = development.start_bank()
        provider = stack.enter_context(_worker("provider", development, "--delay-seconds", str(delay_seconds)))
        ports: dict[str, int] = provider.hello["ports"]
        base = development.configuration(bank, operations_port=0)
        providers = [development.light_provider(bank, name, ports[name]) for name in PROVIDERS]
        changes = {
            "providers": [*base["providers"], *providers],
            "limits": {"calls_per_second": 100_000, "concurrent_calls": 10_000},
        }
        sidecar = development.start_sidecar(bank, changes=changes)
        client = stack.enter_context(custody.Client(development.address, owner=OWNER))
        consents = {name: _import_consent(client, name) for name in PROVIDERS}
        echo_address = f"unix:{development.sockets / 'echo.sock'}"
        echo = stack.enter_context(Worker("benchmarks.echo", echo_address))
        port_options = [text for name in PROVIDERS for text in (f"--{name}-port", str(ports[name]))]
        direct = stack.enter_context(_worker("direct", development, *port_options))
        consent_options = [text for name in PROVIDERS for text in ("--consent", f"{name}={consents[name]}")]
        application = Worker(
            "benchmarks.application", "--address", development.address, "--echo-address", echo_address, *consent_options
        )
        stack.enter_context(application)
        yield System(
            development=development,
            bank=bank,
            sidecar=sidecar,
            provider=provider,
            direct=direct,
            application=application,
            echo=echo,
            client=client,
            consents=consents,
            changes=changes,
        )


def _worker(name: str, development: Development, *arguments: str) -> Worker:
    return Worker(f"benchmarks.{name}", "--directory", str(development.bank_directory), *arguments)


def _import_consent(client: custody.Client, provider: str) -> str:
    now = datetime.now(UTC)
    consent = client.consents.import_consent(
        provider=f"providers/{provider}",
        purposes=(custody.Purpose.BALANCES, custody.Purpose.PAYMENTS, custody.Purpose.SIGNING),
        expire_time=now + timedelta(days=30),
        access_token="a" * 43,
        access_expire_time=now + timedelta(days=1),
        accounts=(_IBAN,),
    )
    return consent.name


def pss_bytes(pid: int) -> int:
    """Memory of a process in which shared pages count by share (proc(5), smaps_rollup). Needs root: they are not dumpable."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise ValueError("the kernel gives no Pss")
