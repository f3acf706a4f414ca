#!/usr/bin/env bash
# The whole service against a real S3 server on this machine, without containers: `make dev`.
#   infra/dev/serve.sh [options of `lorauter serve`, such as --port 8001]
# The store's folder (S3_FOLDER, by default ~/.cache/lorauter/dev-s3) stays; its keys are new at every start and are
# in S3_FOLDER/.env, for other terminals: set -a; . ~/.cache/lorauter/dev-s3/.env
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH="$PWD/.venv/bin:$PATH"
folder="${S3_FOLDER:-${LORAUTER_HOME:-$HOME/.cache/lorauter}/dev-s3}"
port="${S3_PORT:-9000}"
mkdir -p "$folder/buckets/lorauter"

export AWS_ENDPOINT_URL_S3="http://127.0.0.1:$port" AWS_REGION=us-east-1
AWS_ACCESS_KEY_ID="dev" AWS_SECRET_ACCESS_KEY="$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')"
export AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY
(umask 077 && env | grep -E '^AWS_(ENDPOINT_URL_S3|REGION|ACCESS_KEY_ID|SECRET_ACCESS_KEY)=' > "$folder/.env")

rclone serve s3 --config "" --log-level ERROR --addr "127.0.0.1:$port" \
  --auth-key "$AWS_ACCESS_KEY_ID,$AWS_SECRET_ACCESS_KEY" "$folder/buckets" &
store=$!
service=
finish() {
  trap '' INT TERM
  # The service first: what it still writes needs the store.
  if [ -n "$service" ]; then kill "$service" 2>/dev/null || true; wait "$service" || true; fi
  kill "$store" 2>/dev/null || true
  wait "$store" || true
}
trap finish EXIT
trap 'exit 0' INT TERM

until (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do
  kill -0 "$store" 2>/dev/null || { echo "the S3 server did not start; is port $port taken? S3_PORT names another" >&2; exit 1; }
  sleep 0.1
done
echo "S3 server on $AWS_ENDPOINT_URL_S3, keys in $folder/.env" >&2
infra/dev/push.sh
lorauter serve --config infra/dev/serve_config.yaml "$@" &
service=$!
wait "$service"
