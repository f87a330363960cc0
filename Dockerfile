# The sidecar's image. `make image` builds it; docs/packaging.md explains it.
#
#   runtime (default)  no PKCS#11 module: the operator mounts the HSM vendor's
#   dev                with SoftHSM, for trying things out; never for real tokens
#
# Release builds pin the base: --build-arg BASE=debian@sha256:…
# Kept to what buildah 1.28 (Debian 12) understands: no here-documents, no COPY --link.
ARG BASE=debian:bookworm-slim

# ---- Packages, each checked against its hash. pip and everything it needs stay behind in this stage. ----
FROM ${BASE} AS build
RUN apt-get update \
 && apt-get install --yes --no-install-recommends ca-certificates python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/custody/venv
COPY requirements.lock /build/requirements.lock
# Behind a proxy that re-signs TLS: --secret id=ca,src=bundle.pem. With a mirror: --secret id=pip,src=pip.conf.
# Wheels only: an image that needed a compiler would not be the one that was tested.
RUN --mount=type=secret,id=ca,required=false --mount=type=secret,id=pip,required=false \
    if [ -s /run/secrets/ca ]; then export PIP_CERT=/run/secrets/ca; fi \
 && if [ -s /run/secrets/pip ]; then export PIP_CONFIG_FILE=/run/secrets/pip; fi \
 && /opt/custody/venv/bin/pip install --no-cache-dir --disable-pip-version-check --no-compile \
    --require-hashes --no-deps --only-binary=:all: --requirement /build/requirements.lock \
 && /opt/custody/venv/bin/pip uninstall --yes --quiet setuptools pip
COPY sidecar /opt/custody/app/sidecar
COPY clients/python/src /opt/custody/app
# The root file system is read-only at run time, so the bytecode is made here; hash-based, so that equal sources give equal layers.
RUN echo /opt/custody/app > /opt/custody/venv/lib/python3.11/site-packages/token_custody_sidecar.pth \
 && printf '#!/opt/custody/venv/bin/python\nimport sys\nfrom sidecar.cli.main import main\nsys.exit(main())\n' \
    > /opt/custody/venv/bin/custodyctl \
 && chmod -R a+rX,go-w /opt/custody && chmod 0755 /opt/custody/venv/bin/custodyctl \
 && /opt/custody/venv/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/custody

# ---- What both images share. ----
FROM ${BASE} AS base
RUN apt-get update \
 && apt-get install --yes --no-install-recommends ca-certificates python3 \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --system --gid 65532 custody \
 && useradd --system --uid 65532 --gid 65532 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin custody \
 && install --directory --owner=65532 --group=65532 --mode=0750 /run/custody /var/lib/custody \
 && install --directory --mode=0755 /etc/custody
COPY --from=build /opt/custody /opt/custody
# PYTHONMALLOC and GLIBC_TUNABLES: freed memory is overwritten, so that no copy of a secret survives its use.
# LD_BIND_NOW: no symbol is looked up later, when the process has locked itself in. PYTHONSAFEPATH: the working directory is not code.
ENV PATH=/opt/custody/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONSAFEPATH=1 \
    PYTHONMALLOC=malloc \
    GLIBC_TUNABLES=glibc.malloc.perturb=90:glibc.malloc.tcache_count=0 \
    LD_BIND_NOW=1
LABEL org.opencontainers.image.title="token-custody-sidecar" \
      org.opencontainers.image.description="Custody of consent tokens beside an application pod: applications act with a token and never hold it"
WORKDIR /var/lib/custody
STOPSIGNAL SIGTERM
ENTRYPOINT ["/opt/custody/venv/bin/python", "-m", "sidecar"]

# ---- dev: with a software HSM. ----
FROM base AS dev
RUN apt-get update \
 && apt-get install --yes --no-install-recommends opensc softhsm2 \
 && rm -rf /var/lib/apt/lists/*
COPY softhsm /opt/custody/app/softhsm
LABEL org.opencontainers.image.ref.name="dev"
# Numeric: Kubernetes' runAsNonRoot cannot judge a name.
USER 65532:65532
RUN ["/opt/custody/venv/bin/python", "-c", "import sidecar.__main__, sidecar.cli.main, sidecar.egress.__main__, sidecar.hsm.__main__; from softhsm.setup import find_module; find_module()"]

# ---- runtime: the default target, since it comes last. ----
FROM base AS runtime
LABEL org.opencontainers.image.ref.name="runtime"
USER 65532:65532
# Each of the three processes loads, as the user that will run it.
RUN ["/opt/custody/venv/bin/python", "-c", "import sidecar.__main__, sidecar.cli.main, sidecar.egress.__main__, sidecar.hsm.__main__"]
