#!/bin/sh
# Start Grafana with the admin password that was set, or with one that is made up at the first start and kept in
# Grafana's own volume. So there is no default password, and nothing that has to be set before the first start.
set -eu
if [ -z "${GF_SECURITY_ADMIN_PASSWORD:-}" ]; then
    file=${GF_PATHS_DATA:-/var/lib/grafana}/admin-password
    if [ ! -s "$file" ]; then
        (umask 077 && head -c 18 /dev/urandom | base64 > "$file")
    fi
    GF_SECURITY_ADMIN_PASSWORD=$(cat "$file")
    export GF_SECURITY_ADMIN_PASSWORD
    # Not for sure: a volume that began with a password which was set keeps that one.
    echo "Grafana's admin password is in $file, in this container, unless one was set at the first start or since."
fi
exec "${GRAFANA_RUN:-/run.sh}" "$@"
