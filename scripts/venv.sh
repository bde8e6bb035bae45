# shellcheck shell=bash
# Sourced: `activate_venv FILE` makes a virtual environment for $PYTHON with the requirements of FILE
# and moe_jax itself, unless it is there already, and activates it.

activate_venv() {
    local requirements=$1 python=${PYTHON:-} version stamp wanted
    if [ -z "$python" ]; then
        python=python3
        if python3.11 -c "" 2>/dev/null; then python=python3.11; fi
    fi
    if ! version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null); then
        echo "PYTHON=$python does not run; give the path of a Python 3.11 or newer" >&2
        return 2
    fi
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "PYTHON=$python is Python $version; moe_jax needs 3.11 or newer" >&2
        return 2
    fi
    local venv=.venv/$version
    stamp=$venv/installed-${requirements%.txt}
    wanted=$(cat requirements*.txt pyproject.toml | cksum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "installing $requirements into $venv (a minute or two, once)"
        [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -e .
        echo "$wanted" >"$stamp"
    fi
    # shellcheck disable=SC1091
    source "$venv/bin/activate"
}
