# Writes a shard to stdout, as the command of a `pipe:` URL. After the first $2 shards of its folder it waits for a file `go`
# there: so a test can do something in the middle of a run, at whatever speed it goes.
folder=$(dirname "$1")
echo >>"$folder/opened"
if [ "$(wc -l <"$folder/opened")" -gt "$2" ]; then
    while [ -d "$folder" ] && [ ! -e "$folder/go" ]; do sleep 0.05; done
fi
cat "$1"
