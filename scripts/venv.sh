# Sourced by the other scripts: changes to the repository's root and makes venv (.venv) there, or keeps a working one.
# On a CPU every run of a program takes fresh memory for its temporary arrays: in large pages that is much faster.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${venv:-.venv}

is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

if ! { is_new_enough "$venv/bin/python" && "$venv"/bin/python -m pip --version >/dev/null 2>&1; }; then
    for python in python3 python3.13 python3.12 python3.11 ""; do
        if [[ -n $python ]] && is_new_enough "$python"; then break; fi
    done
    if [[ -z $python ]]; then
        echo "rlhf_jax needs Python 3.11 or newer, but python3 is $(python3 --version 2>&1 || true)." >&2
        echo "Install one (as python3, python3.13, python3.12 or python3.11) and run this again." >&2
        exit 1
    fi
    echo "making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
fi

install() {
    echo "installing $* (minutes the first time)"
    "$venv"/bin/python -m pip install --quiet --disable-pip-version-check "$@"
}
