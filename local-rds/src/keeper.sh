#!/bin/sh
# Runs a server while standard input is open and the folder of the server exists. When the process that started this
# script ends, in whatever way, the kernel closes the input. Then the script stops the server and deletes the folder.
#
# keeper.sh BIN FOLDER PORT SUPERUSER
bin=$1 folder=$2 port=$3 superuser=$4

trap '' HUP INT QUIT
exec 3<&0
(
    test -d "$folder/data" || "$bin/initdb" -D "$folder/data" --username="$superuser" --encoding=UTF8 \
        --locale=C --auth=trust --no-sync || exit
    exec "$bin/postgres" -D "$folder/data" -k "$folder/data" -p "$port" -c config_file="$folder/postgresql.conf"
) </dev/null >>"$folder/log" 2>&1 3<&- &
server=$!

stop() {
    # Repeat the signal, because initdb and postgres ignore it for a moment when they start. After 5 s send QUIT,
    # because PostgreSQL 18 may wait for ever in recovery after a crash. After 30 s send KILL, to this script as well.
    signal=INT tries=0
    while kill -0 "$server"; do
        tries=$((tries + 1))
        case $tries in 100) signal=QUIT ;; 600) signal=KILL ;; esac
        kill "-$signal" 0
        sleep 0.05
    done
}

# Stop the server when the input is closed, or when the folder is deleted.
{ cat <&3 >/dev/null; stop; } &
input=$!
{ while test -d "$folder" && kill -0 "$server"; do sleep 1; done; stop; } 3<&- &
exec 3<&-

wait "$server"
echo >"$folder/ended"
# Until the input is closed, its owner may read the log.
wait "$input"
test -e "$folder/keep" || rm -rf "$folder"
# Two processes of this group are left: this script, and the `sleep` of the loop that watches the folder.
kill -KILL 0
