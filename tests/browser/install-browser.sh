#!/usr/bin/env bash
# Installs the browser in which the tests open pages, where this user may; they skip themselves, loudly, where it may
# not. Usage: tests/browser/install-browser.sh
set -euo pipefail
if command -v chromium >/dev/null; then
  exit 0
fi
as_root=()
if ((EUID != 0)); then
  if ! sudo -n true 2>/dev/null; then
    echo "NOT ROOT, and sudo asks for a password: Chromium is NOT installed, pages are NOT tested in a browser." >&2
    echo "As root: apt-get install chromium" >&2
    exit 0
  fi
  as_root=(sudo -n)
fi
export DEBIAN_FRONTEND=noninteractive
"${as_root[@]}" apt-get update -qq
"${as_root[@]}" apt-get install -y -qq --no-install-recommends chromium >/dev/null
