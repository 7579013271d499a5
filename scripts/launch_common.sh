# shellcheck shell=sh
# What the launch scripts share, sourced by them: errors, checks of values, and `run`, which carries a command out, or
# with --dry-run prints it the way a shell would read it.
: "${program:?the caller sets its name}" "${dry_run:?the caller sets it to yes or no}"

die() {
  printf '%s: error: %s\n' "$program" "$*" >&2
  exit 2
}

say() { printf '%s: %s\n' "$program" "$*" >&2; }

# usage SCRIPT: the comment at its top.
usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$1"; }

# quoted ARGUMENT...: one line that a shell splits into exactly these arguments.
quoted() {
  separator=""
  for argument in "$@"; do
    case $argument in
      "" | *[!A-Za-z0-9_./:=,@%+-]*)
        printf "%s'%s'" "$separator" "$(printf '%s' "$argument" | sed "s/'/'\\\\''/g")" ;;
      *) printf '%s%s' "$separator" "$argument" ;;
    esac
    separator=" "
  done
}

# run COMMAND...: carry it out, after printing it to stderr; with --dry-run only print it, to stdout.
run() {
  if [ "$dry_run" = yes ]; then
    printf '%s\n' "$(quoted "$@")"
  else
    printf '+ %s\n' "$(quoted "$@")" >&2
    "$@"
  fi
}

# finish COMMAND...: like run, but the command takes this script's place, so that signals reach it.
finish() {
  if [ "$dry_run" = yes ]; then
    run "$@"
    exit
  fi
  printf '+ %s\n' "$(quoted "$@")" >&2
  exec "$@"
}

# needs_value OPTION ARGUMENT...: a value follows the option; an empty one would be taken for the default.
needs_value() {
  [ $# -ge 2 ] || die "$1 needs a value"
  [ -n "$2" ] || die "$1 '' is empty: give a value, or leave the option out for its default"
}

# one_of OPTION VALUE CHOICE...
one_of() {
  option=$1 value=$2
  shift 2
  for choice in "$@"; do
    [ "$value" != "$choice" ] || return 0
  done
  die "$option $value is none of: $*"
}

# whole_number OPTION VALUE LEAST MOST
whole_number() {
  case $2 in
    "" | *[!0-9]* | ??????????*) die "$1 '$2' must be a whole number from $3 to $4" ;;
    0?*) die "$1 '$2' must be a number without leading zeros" ;; # to a shell it would be octal
  esac
  [ "$2" -ge "$3" ] && [ "$2" -le "$4" ] || die "$1 $2 must be from $3 to $4"
}

# matches OPTION VALUE PATTERN MEANING: the whole value matches the extended regular expression.
matches() {
  case $2 in *"
"*) die "$1: the value must be one line" ;; esac
  printf '%s\n' "$2" | grep -Eqx -- "$3" || die "$1 '$2' must be $4"
}

# mesh_size MESH: how many devices one replica takes; an empty mesh takes one.
mesh_size() {
  size=1
  for axis in $(printf '%s' "$1" | tr ',' ' '); do
    size=$((size * ${axis#*=}))
  done
  printf '%s' "$size"
}

# check_mesh MESH REPLICAS
check_mesh() {
  axis='(pipe|data|context|expert|tensor)=[1-9][0-9]{0,4}'
  [ -z "$1" ] || matches --mesh "$1" "$axis(,$axis)*" \
    "axes with sizes, as in tensor=4,context=2; the axes are pipe, data, context, expert, tensor"
  twice=$(printf '%s' "$1" | tr ',' '\n' | sed 's/=.*//' | sort | uniq -d)
  [ -z "$twice" ] || die "--mesh $1 names $twice twice"
  whole_number --replicas "$2" 1 4096
}

# needs_devices MESH REPLICAS NUM_DEVICES NUM_HOSTS WHERE: they are enough; several hosts must be in the mesh as a whole.
needs_devices() {
  needed=$(($(mesh_size "$1") * $2))
  [ "$needed" -le "$3" ] || die "--mesh '$1' with --replicas $2 needs $needed devices; $5 has $3"
  [ "$4" = 1 ] || [ "$needed" = "$3" ] \
    || die "--mesh '$1' takes $needed of the $3 devices of $5: $4 hosts serve together only with all, as in tensor=$3"
}
