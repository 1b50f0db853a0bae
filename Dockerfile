# syntax=docker/dockerfile:1
# SPDX-License-Identifier: Apache-2.0
#
# One image for the agent, the operator, the CNI installer and the `weir` command.
#
# BASE is any Debian 12 (or newer) or Ubuntu 24.04 (or newer) image. Both apt and pip take the
# building machine's settings from secrets, so nothing of that machine stays in the image; without
# them they use their defaults. Layers follow how often things change: packages, then Python
# dependencies, then Weir itself.
ARG BASE=debian:bookworm-slim

FROM ${BASE} AS runtime
ENV PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    PATH=/opt/weir/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
RUN --mount=type=secret,id=apt_conf,target=/etc/apt/apt.conf.d/99build,mode=0444 \
    --mount=type=secret,id=ca,target=/run/secrets/ca.crt,mode=0444 \
    export DEBIAN_FRONTEND=noninteractive \
 && apt-get -qq update \
 && apt-get -qq install -y --no-install-recommends libbpf1 python3 >/dev/null \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log \
    /usr/share/doc /usr/share/man /usr/share/locale /usr/share/info

# The compilers stay here.
FROM runtime AS tools
RUN --mount=type=secret,id=apt_conf,target=/etc/apt/apt.conf.d/99build,mode=0444 \
    --mount=type=secret,id=ca,target=/run/secrets/ca.crt,mode=0444 \
    export DEBIAN_FRONTEND=noninteractive \
 && apt-get -qq update \
 && apt-get -qq install -y --no-install-recommends ca-certificates clang gcc libbpf-dev libc6-dev \
    llvm make musl-tools python3-dev python3-venv >/dev/null

FROM tools AS dependencies
WORKDIR /src
COPY pyproject.toml hack/requirements.py ./
# /opt/weir has what runs in the cluster, /opt/build what builds the wheel: both before the
# sources, so that a changed source installs nothing again.
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf,mode=0444 \
    --mount=type=secret,id=ca,target=/run/secrets/ca.crt,mode=0444 \
    --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/build \
 && python3 -m venv --without-pip /opt/weir \
 && python3 requirements.py build > build.txt \
 && python3 requirements.py runtime > runtime.txt \
 && /opt/build/bin/pip --quiet install -r build.txt \
 && /opt/build/bin/pip --quiet --python /opt/weir/bin/python install -r runtime.txt

FROM dependencies AS build
COPY . .
# The wheel's files go to a folder of their own: a small layer of the result.
RUN PATH=/opt/build/bin:$PATH pip --quiet wheel --no-deps --no-build-isolation --wheel-dir /wheel . \
 && mkdir -p /out/opt/weir/libexec \
 && /opt/build/bin/pip --quiet --python /opt/weir/bin/python install \
    --no-deps --no-warn-script-location --prefix /out/opt/weir /wheel/*.whl \
 && make -C cni/shim \
 && install -m 0755 build/shim/weir /out/opt/weir/libexec/weir

FROM runtime
COPY --from=dependencies /opt/weir /opt/weir
COPY --from=build /out/opt/weir /opt/weir
LABEL org.opencontainers.image.title="weir" \
      org.opencontainers.image.licenses="Apache-2.0 AND (GPL-2.0-only OR BSD-2-Clause)"
ENTRYPOINT ["/opt/weir/bin/python3"]
