#!/usr/bin/env bash
# Installs what tests use that pip has not: SLURM with munge, Open MPI, a browser, and a Java. On Debian or Ubuntu, as root.
set -euo pipefail
packages=(slurm-client slurmctld slurmd munge openmpi-bin chromium)
command -v java >/dev/null || packages+=(default-jre-headless)
if dpkg --status "${packages[@]}" >/dev/null 2>&1; then
    exit
fi
# RUNLEVEL: that the packages start no daemons. The tests start their own, and end them.
export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
apt-get update -qq
apt-get install -qq --yes --no-install-recommends "${packages[@]}" >/dev/null
