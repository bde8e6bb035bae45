# shellcheck shell=bash
# Sourced: `activate_venv FILE` makes a virtual environment for $PYTHON with the requirements of FILE
# and moe_jax itself, unless it is there already, and activates it.

# Adds to jax what the accelerator of this machine needs, in jax's own version.
install_accelerator() {
    local extra='' version
    if nvidia-smi >/dev/null 2>&1; then
        extra=cuda12
    elif compgen -G "/dev/accel*" >/dev/null || compgen -G "/dev/vfio/[0-9]*" >/dev/null; then
        extra=tpu
    fi
    if [ -n "$extra" ]; then
        version=$("$1" -c 'import jax; print(jax.__version__)')
        echo "installing jax[$extra]==$version for the accelerator of this machine"
        "$1" -m pip install --quiet --disable-pip-version-check "jax[$extra]==$version"
    fi
    "$1" -c 'import jax; print("jax", jax.__version__, "on", jax.devices()[0].device_kind)'
}

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
        install_accelerator "$venv/bin/python"
        echo "$wanted" >"$stamp"
    fi
    # shellcheck disable=SC1091
    source "$venv/bin/activate"
}
