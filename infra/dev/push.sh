#!/bin/sh
# Puts the example pool, and a catalog of the example tasks or of the folder TASKS, into the S3 store that
# AWS_ENDPOINT_URL_S3 names; what is there already stays.
set -eu
lorauter adapters push examples/adapters --to s3://lorauter/adapters
lorauter catalog build --tasks "${TASKS:-examples/tasks}" --adapters s3://lorauter/adapters --out s3://lorauter/catalog
