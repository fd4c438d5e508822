#!/usr/bin/env bash
# What is done on each machine of a run: install, start, status, log, pack, unpack, stop.
# Everything lies in this script's folder: code/, venv/, run/, log, and exit once it has ended.
set -euo pipefail

venv() { # FOLDER PACKAGE: a virtual environment with Python 3.11 or newer, and the package in it
    local python
    for python in python3.13 python3.12 python3.11 python3; do
        [ -x "$1/bin/python" ] && break
        if "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
            "$python" -m venv "$1"
        fi
    done
    if [ ! -x "$1/bin/python" ]; then # Ubuntu 22.04 brings Python 3.10
        python3 -m pip install --quiet --user uv
        python3 -m uv venv --quiet --seed --python 3.12 "$1"
    fi
    "$1/bin/python" -m pip install --quiet --disable-pip-version-check "$2"
}

alive() { # begun, not ended, and not a zombie
    local now
    [ -f pid ] && [ ! -f exit ] && read -r _ _ now _ < "/proc/$(< pid)/stat" && [ "$now" != Z ]
} 2> /dev/null

stop() {
    alive || return 0
    kill -TERM -- "-$(< pid)" 2> /dev/null || true # a run that is asked saves a checkpoint
    for _ in $(seq 900); do
        alive || return 0
        sleep 0.1
    done
    kill -KILL -- "-$(< pid)" 2> /dev/null || true
}

task=$1
shift
if [ "$task" = venv ]; then
    venv "$@"
    exit
fi
cd "$(dirname "$0")"

case $task in
    install)
        rm -rf code && mkdir code
        tar -xzf code.tar.gz -C code
        venv venv './code[tpu]' > install.log 2>&1 || {
            tail -n 5 install.log >&2
            exit 1
        }
        ;;
    start) # MODULE ARGUMENTS...: detached, so that it outlives the connection
        # Tried again after a connection that broke, it leaves alone what it has started.
        [ -f env.sh ] || exit 0
        stop
        rm -f exit log
        mkdir -p run
        mv env.sh env.now
        nohup setsid bash ./worker.sh run "$@" > /dev/null 2>&1 < /dev/null &
        echo $! > pid
        ;;
    run)
        trap : TERM # the command gets the signal too; this shell stays to write its status
        . ./env.now
        rm env.now # it may hold secrets; each launch ships it anew
        cd code
        status=0
        ../venv/bin/python -u -m "$@" >> ../log 2>&1 || status=$?
        echo "$status" > ../exit.part
        mv ../exit.part ../exit
        ;;
    status)
        state=lost
        alive && state=running
        [ -f pid ] || state=absent
        [ -f exit ] && state="exited $(< exit)"
        echo "worker $(hostname) $state"
        ;;
    log) # OFFSET: what the log holds after that many bytes
        if [ -f log ]; then tail -c "+$(($1 + 1))" log; fi
        ;;
    pack)
        tar -czf run.tar.gz.part -C run . || [ $? -eq 1 ] # 1: a file changed meanwhile
        mv run.tar.gz.part run.tar.gz
        ;;
    unpack)
        rm -rf run && mkdir run
        tar -xzf run.tar.gz -C run
        ;;
    stop)
        stop
        rm -f env.sh env.now
        ;;
    *)
        echo "worker.sh: no task $task" >&2
        exit 2
        ;;
esac
