"""The text files of a federation's folder; $names are filled in by `fedsim.deploy.folder`."""

SUPERLINK = """\
#!/usr/bin/env bash
# Starts the SuperLink of $name. Without FEDSIM_BIND it listens on loopback only, behind gateway.conf: anyone who reaches its port can
# submit runs, and runs bring code to the clients. Use FEDSIM_BIND=0.0.0.0 only on a network where everyone may do that.
set -euo pipefail
cd "$$(dirname "$${BASH_SOURCE[0]}")"
export FLWR_HOME="$$PWD/flwr" $quiet
umask 077
place="root-certificates = \\"$$PWD/ca.crt\\""
grep -qxF "$$place" flwr/config.toml || sed -i "s|^root-certificates = .*|$$place|" flwr/config.toml  # the folder's current path
exec flower-superlink --ssl-ca-certfile ca.crt --ssl-certfile server.crt --ssl-keyfile server.key --enable-supernode-auth \\
    --disable-runtime-dependency-installation --host "$${FEDSIM_BIND:-127.0.0.1}" --port "$${FEDSIM_PORT:-$port}" --database state.db
"""

SUPERNODE = """\
#!/usr/bin/env bash
# Starts the SuperNode of client $client; its worker starts with the first message and ends with this script. A SuperNode that dies is
# restarted, several times if need be: for about a minute the SuperLink refuses it, while it still counts the dead one as connected.
set -euo pipefail
cd "$$(dirname "$${BASH_SOURCE[0]}")"
export FLWR_HOME="$$PWD/flwr" $quiet
umask 077
child=
trap 'kill "$$child" 2>/dev/null || true; wait "$$child" 2>/dev/null || true; fedsim worker client.yaml --stop' EXIT
trap 'exit 143' TERM
trap 'exit 130' INT
failures=0
while true; do
    begun=$$SECONDS code=0
    flower-supernode --root-certificates ca.crt --superlink "$${FEDSIM_SUPERLINK:-$host:$port}" --auth-supernode-private-key key \\
        --node-config "partition-id=$client num-partitions=$clients client-file=\\"$$PWD/client.yaml\\"" \\
        --port "$${FEDSIM_PORT:-$runtime_port}" &
    child=$$!
    wait "$$child" || code=$$?
    if ((SECONDS - begun > 60)); then failures=0; fi
    failures=$$((failures + 1))
    if ((code == 0 || failures > 8)); then exit "$$code"; fi
    echo "The SuperNode ended with code $$code. Restarting in 10 s, at most $$((9 - failures)) times if it keeps failing." >&2
    sleep 10 &
    child=$$!
    wait "$$child"
done
"""

FLWR_CONFIG = """\
# Flower's configuration on the server: `export FLWR_HOME=<this folder>` for flwr, and for fedsim run engine=deployment.
[superlink]
default = "$name"

[superlink.$name]
address = "127.0.0.1:$port"
root-certificates = $certificate
"""

GATEWAY = """\
# nginx in front of the SuperLink: clients reach the Fleet API and nothing else. Replace PUBLIC_ADDRESS by the server's public address.
# The Control API, which takes runs, and the Runtime API stay on loopback.
events {}
http {
    client_max_body_size 0;
    server {
        listen PUBLIC_ADDRESS:$port ssl;
        ssl_certificate     server.crt;
        ssl_certificate_key server.key;
        ssl_protocols       TLSv1.3;
        location /v1/fleet/ {
            proxy_pass https://$upstream;
            proxy_ssl_trusted_certificate ca.crt;
            proxy_ssl_verify on;
            proxy_ssl_name localhost;
            proxy_http_version 1.1;
            proxy_request_buffering off;
            proxy_read_timeout 1h;
        }
        location / { return 404; }
    }
}
"""

SUPERLINK_UNIT = """\
# /etc/systemd/system/fedsim-superlink.service; Adapt user and folders.
[Unit]
Description=Flower SuperLink of $name
After=network-online.target
Wants=network-online.target

[Service]
User=fedsim
Environment=PATH=/opt/fedsim/.venv/bin:/usr/bin:/bin
Environment=XDG_CACHE_HOME=/opt/fedsim/$name/server/cache
ExecStart=/opt/fedsim/$name/server/superlink.sh
Restart=on-failure
RestartSec=5
NoNewPrivileges=yes
ProtectSystem=strict
ReadWritePaths=/opt/fedsim/$name/server
ProtectHome=yes
PrivateTmp=yes

[Install]
WantedBy=multi-user.target
"""

SUPERNODE_UNIT = """\
# /etc/systemd/system/fedsim-supernode.service on the machine of client $client; Adapt user and folders.
[Unit]
Description=Flower SuperNode of client $client of $name
After=network-online.target
Wants=network-online.target

[Service]
User=fedsim
Environment=PATH=/opt/fedsim/.venv/bin:/usr/bin:/bin
Environment=XDG_CACHE_HOME=/opt/fedsim/client-$client/cache
ExecStart=/opt/fedsim/client-$client/supernode.sh
Restart=on-failure
RestartSec=5
NoNewPrivileges=yes
ProtectSystem=strict
ReadWritePaths=/opt/fedsim/client-$client
ProtectHome=read-only
PrivateTmp=yes

[Install]
WantedBy=multi-user.target
"""

DOCKERFILE = """\
# The image of server and clients. Build it in a checkout of fedsim: docker build -t fedsim -f THIS/FOLDER/Dockerfile .
FROM python:3.11-slim
WORKDIR /opt/fedsim
COPY . .
RUN PYTHON=python3 .ci/setup && useradd --create-home --uid 1000 fedsim
ENV PATH=/opt/fedsim/.venv/bin:$$PATH
USER fedsim
"""

COMPOSE_HEAD = """\
# The whole federation in containers, for a trial; in production each client runs its service on its own machine.
# The folders must belong to user 1000: chown -R 1000 server clients
# Clients are refused until their keys are registered: docker compose exec superlink fedsim deploy register /federation
services:
  superlink:
    image: fedsim
    command: /federation/superlink.sh
    environment: {FEDSIM_BIND: 0.0.0.0}
    volumes: [./server:/federation]
    networks: {inside: {aliases: [$host]}}
"""

COMPOSE_CLIENT = """\
  client-$client:
    image: fedsim
    command: /client/supernode.sh
    volumes: [./clients/client-$client:/client]
    networks: [inside]
    depends_on: [superlink]
    restart: on-failure
"""

COMPOSE_TAIL = """\
networks:
  inside: {}
"""

README = """\
# Federation $name: one server, $clients clients

Created by `fedsim deploy init`. Every machine needs the same version of fedsim: `make setup` in a checkout, its .venv/bin in PATH.

1. Server: copy `server/` there and start `server/superlink.sh` (or `fedsim-superlink.service`). It listens on loopback. Run the
   steps below in the folder that contains `server/`.
2. Server: put `gateway.conf` in front of it, so that clients reach the Fleet API and nothing else. On a network where everyone
   may submit runs, start it with `FEDSIM_BIND=0.0.0.0` instead.
3. Server: `fedsim deploy register server` admits the clients' public keys (`server/keys/`). Unregistered clients are refused.
4. Client i: copy `clients/client-<i>/` to its machine and nowhere else, since it contains the private key. Its owner edits
   `client.yaml` (data, base model, and what to accept), then starts `supernode.sh` (or `fedsim-supernode.service`).
5. Server: `fedsim deploy status server` shows the connected clients.
6. Server: `export FLWR_HOME=$$PWD/server/flwr`, then
   `fedsim run engine=deployment engine.superlink=$name federation.clients=$clients ...`.
   Run folders are on the server, under `server/runs` by default.

| secret | where it belongs | purpose |
|---|---|---|
| `ca/ca.key` | offline, with the operator of the federation | signs server certificates; needed again only for a new one |
| `server/server.key` | the server | TLS |
| `clients/client-<i>/key` | client i | proves that a node is client i, by `server/registered/client-<i>.json` of step 3 |

All of them have mode 0600. Running `fedsim deploy init` again keeps them, every `client.yaml`, and options that are not given again; it
rewrites all other files, so set PUBLIC_ADDRESS in `gateway.conf` again. `--new-keys` replaces keys and certificates: copy the folders
over the old ones, except `client.yaml`, which belongs to its owner, and restart everything. Step 3 then admits the new keys and
revokes the old ones. Certificates are valid for $hosts; the server's for 825 days, the authority's for ten years.
"""
