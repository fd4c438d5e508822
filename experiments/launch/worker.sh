#!/usr/bin/env bash
# What is done on each machine of a run: install, mount, start, status, log, pack, unpack, stop.
# Everything lies in this script's folder: code/, venv/, run/, log, and exit once it has ended.
# On shared storage, mounted at shared/, run is a link to a folder there.
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

fail() { # a sentence that the launcher hands on
    echo "worker.sh: $*" >&2
    exit 1
}

from_apt() { # PACKAGE: waits for what installs updates when a machine starts
    sudo apt-get -q -o DPkg::Lock::Timeout=600 update
    sudo DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=600 install "$1"
}

mount_bucket() { # BUCKET: at shared/
    local key=/usr/share/keyrings/cloud.google.asc site=https://packages.cloud.google.com/apt
    if ! [[ $(gcsfuse --version 2> /dev/null) =~ version\ ([0-9]+) && ${BASH_REMATCH[1]} -ge 3 ]]; then
        curl -fsSL "$site/doc/apt-key.gpg" | sudo tee "$key" > /dev/null
        echo "deb [signed-by=$key] $site gcsfuse-$(lsb_release -c -s) main" \
            | sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
        from_apt gcsfuse
    fi
    # Workers read what others just wrote, so nothing may be cached, which on TPU machines is the
    # default; and a folder is renamed as one, or not at all, as orbax needs of a checkpoint.
    gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
        --rename-dir-limit=0 "$1" shared
}

mount_share() { # HOST:/SHARE: at shared/
    command -v mount.nfs > /dev/null || [ -x /sbin/mount.nfs ] || from_apt nfs-common
    sudo mount -t nfs -o hard,actimeo=0,lookupcache=none "$1" shared
}

shared() { # SOURCE FOLDER: run/ becomes a link to that folder of gs://BUCKET or HOST:/SHARE
    local here probe
    here=$(hostname)
    if [ "$(cat shared.source 2> /dev/null)" != "$1" ] || ! mountpoint -q shared; then
        sudo umount -l shared > /dev/null 2>&1 || true # of another source, or of a dead gcsfuse
        mkdir -p shared
        bash ./worker.sh attach "$1" > mount.log 2>&1 \
            || fail "$1 cannot be mounted on $here: $(tail -n 1 mount.log)"
        echo "$1" > shared.source
    fi
    mkdir -p "shared/$2" 2> /dev/null \
        || sudo install -d -o "$(id -u)" "shared/$2" > mount.log 2>&1 \
        || fail "no folder $2 can be made on $1: $(tail -n 1 mount.log)"
    probe=shared/$2/.probe-$here
    rm -rf "$probe" "$probe.renamed"
    { mkdir "$probe" && : > "$probe/file"; } > mount.log 2>&1 \
        || fail "$here cannot write to $2 on $1: $(tail -n 1 mount.log)"
    mv "$probe" "$probe.renamed" > mount.log 2>&1 || {
        rm -rf "$probe"
        fail "$1 cannot rename a folder, which checkpoints need: take a bucket with a hierarchical" \
            "namespace (gcloud storage buckets create --uniform-bucket-level-access" \
            "--enable-hierarchical-namespace)"
    }
    rm -rf "$probe.renamed"
    if [ -d run ] && [ ! -L run ]; then
        rmdir run 2> /dev/null || mv run "run.$(date +%s)" # of another launch, not fetched yet
    fi
    ln -sfn "shared/$2" run
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
        if [ -L run ]; then rm run; fi
        venv venv './code[tpu]' > install.log 2>&1 || {
            tail -n 5 install.log >&2
            exit 1
        }
        ;;
    mount) # SOURCE FOLDER
        shared "$@"
        ;;
    attach) # SOURCE: a process of its own, which ends where a command of it fails
        case $1 in
            gs://*) mount_bucket "${1#gs://}" ;;
            *) mount_share "$1" ;;
        esac
        ;;
    look) # the first file of the run, if there is any
        ls -A run/ | head -n 1
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
        mkdir -p run
        find run/ -mindepth 1 -delete # run may be a link
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
