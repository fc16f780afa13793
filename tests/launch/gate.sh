# Writes a shard to stdout, as the command of a `pipe:` URL. After the first $2 shards of its folder it waits for a file `go`
# there: so a test can do something in the middle of a run, at whatever speed it goes.
folder=$(dirname "$1")
echo >>"$folder/opened"
if [ "$(wc -l <"$folder/opened")" -gt "$2" ]; then
    for _ in $(seq 12000); do # ten minutes: should the test be killed, a run that it left behind ends too
        [ -e "$folder/go" ] && break
        sleep 0.05
    done
    [ -e "$folder/go" ] || exit 1
fi
cat "$1"
