# SPDX-License-Identifier: Apache-2.0
# docker build -t expertd:0.1.0 .
# With GPUs: --build-arg BUILD_BASE=IMAGE, a development image of CUDA 13 on Debian 12. The result needs no CUDA packages:
# the runtime is linked in, and the driver's library comes from the node.
ARG BUILD_BASE=debian:12-slim
ARG RUNTIME_BASE=debian:12-slim
ARG UCX=distribution

FROM ${BUILD_BASE} AS deps
COPY deploy/dev/install-packages /usr/local/sbin/install-packages
RUN apt-get update \
 && install-packages build \
 && rm -rf /var/lib/apt/lists/*

# A UCX that reaches memory of GPUs, for the backend direct of the fabric: --build-arg UCX=cuda, with a BUILD_BASE that has CUDA, and
# --build-context ucx-source=FOLDER, the unpacked release of UCX 1.18 or newer. By default the distribution's, which goes through memory of
# the host. Not built where the project is tested.
FROM scratch AS ucx-source

FROM deps AS ucx-distribution
RUN install -d /opt/ucx

FROM deps AS ucx-cuda
COPY --from=ucx-source / /tmp/ucx/
RUN cd /tmp/ucx \
 && ./contrib/configure-release --prefix=/opt/ucx --enable-mt --with-verbs --with-cuda=/usr/local/cuda \
      --without-go --without-java --disable-static \
 && make -j"$(nproc)" && make install \
 && rm -rf /tmp/ucx

FROM ucx-${UCX} AS ucx

FROM deps AS build
COPY --from=ucx /opt/ucx/ /opt/ucx/
ENV PKG_CONFIG_PATH=/opt/ucx/lib/pkgconfig CMAKE_PREFIX_PATH=/opt/ucx
WORKDIR /src
COPY . .
RUN deploy/dev/build build -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_INSTALL_PREFIX=/usr -DEXPERTD_BUNDLE=OFF \
      -- expertd_programs \
 && DESTDIR=/out cmake --install build --prefix /usr --strip

FROM ${RUNTIME_BASE} AS runtime
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      libgrpc++1.51 libprotobuf32 libspdlog1.10 libprometheus-cpp-core1.0 libprometheus-cpp-pull1.0 \
      libnghttp2-14 libtomlplusplus3 libucx0 tini \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 64646 expertd \
 && useradd --uid 64646 --gid 64646 --no-create-home --home-dir /run/expertd --shell /usr/sbin/nologin expertd \
 && install -d -o expertd -g expertd -m 0750 /run/expertd \
 && install -d /etc/expertd
COPY --from=build /out/ /
# Empty with the distribution's; the loader looks there first.
COPY --from=ucx /opt/ucx/ /opt/ucx/
RUN echo /opt/ucx/lib >/etc/ld.so.conf.d/000-ucx.conf && ldconfig
COPY deploy/container/entrypoint /usr/lib/expertd/entrypoint
# UCX reads these in library constructors, before main.
ENV UCX_HANDLE_ERRORS=none UCX_ERROR_SIGNALS= UCX_DEBUG_SIGNO=0 \
    CUDA_MODULE_LOADING=EAGER CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_DEVICE_MAX_CONNECTIONS=32
USER 64646:64646
EXPOSE 9464
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 CMD ["/usr/bin/expertctl", "health"]
# tini is process 1: it forwards signals and reaps; expertd gets a process id of its own.
ENTRYPOINT ["/usr/bin/tini", "--", "/usr/lib/expertd/entrypoint"]
