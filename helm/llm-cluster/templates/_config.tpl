{{/* The configuration file, and what follows from it. */}}

{{/* One line for each setting of a section. JSON writes large numbers in full, which YAML's printer does not. */}}
{{- define "llm-cluster.settings" -}}
{{- range $name, $value := . }}
{{ $name }}: {{ toJson $value }}
{{- end }}
{{- end -}}

{{/* Seconds that the longest allowed generation takes; no drain may be given more than a day. */}}
{{- define "llm-cluster.longestGeneration" -}}
{{- $drain := .Values.drain -}}
{{- $longest := 0 -}}
{{- range .Values.models -}}
{{- $seconds := $drain.longestGenerationSeconds -}}
{{- with .max_model_len -}}{{- $seconds = mulf . $drain.secondsPerToken | ceil -}}{{- end -}}
{{- $longest = max $longest ($seconds | int64) -}}
{{- else -}}
{{- $longest = $drain.longestGenerationSeconds | int64 -}}
{{- end -}}
{{- min $longest 86400 -}}
{{- end -}}

{{/* Seconds that a process of a kind ("router", "controller") may drain. */}}
{{- define "llm-cluster.drainSeconds" -}}
{{- $set := get (get .root.Values.config .kind) "drain_deadline_s" -}}
{{- if or (kindIs "invalid" $set) (kindIs "string" $set) -}}
{{- include "llm-cluster.longestGeneration" .root -}}
{{- else -}}
{{- $set | toJson -}}
{{- end -}}
{{- end -}}

{{/* The same in whole seconds. */}}
{{- define "llm-cluster.wholeDrainSeconds" -}}
{{- include "llm-cluster.drainSeconds" . | float64 | ceil | int64 -}}
{{- end -}}

{{- define "llm-cluster.section" -}}
{{- $drain := include "llm-cluster.drainSeconds" . | float64 -}}
{{- include "llm-cluster.settings" (merge (dict "drain_deadline_s" $drain) (get .root.Values.config .kind)) | trim -}}
{{- end -}}

{{- define "llm-cluster.rankPorts" -}}
{{- $ports := .Values.config.controller.rank_ports | default (list 20000 23999) -}}
{{- dict "first" (index $ports 0 | int64) "last" (index $ports 1 | int64) | toJson -}}
{{- end -}}

{{/* Where the hub listens: hub.endpoint's port. */}}
{{- define "llm-cluster.hubPort" -}}
{{- $url := urlParse (.Values.hub.endpoint | default "https://huggingface.co") -}}
{{- $port := regexFind ":[0-9]+$" $url.host | trimPrefix ":" -}}
{{- $port | default (ternary "80" "443" (eq $url.scheme "http")) -}}
{{- end -}}

{{/* The last port of Engine in the largest pod. */}}
{{- define "llm-cluster.lastEnginePort" -}}
{{- add 50059 (include "llm-cluster.rankPortCount" (include "llm-cluster.mostDevices" .)) -}}
{{- end -}}

{{/* The worker groups with their defaults, as {"groups": [...]}: Helm does not merge the items of a list. */}}
{{- define "llm-cluster.workerGroups" -}}
{{- $root := . -}}
{{- $groups := list -}}
{{- range .Values.workers -}}
{{- $defaults := $root.Files.Get "files/worker-group.json" | fromJson -}}
{{- $groups = append $groups (mergeOverwrite $defaults .) -}}
{{- end -}}
{{- dict "groups" $groups | toJson -}}
{{- end -}}

{{/* Devices of the largest pod. */}}
{{- define "llm-cluster.mostDevices" -}}
{{- $most := 1 -}}
{{- range (include "llm-cluster.workerGroups" . | fromJson).groups -}}
{{- $most = max $most (.devicesPerPod | int64) -}}
{{- end -}}
{{- $most -}}
{{- end -}}

{{/*
Ports of ranks in a pod, from the first on: one for each device, and two more, since a rank that is replaced may hold its
port a moment longer than its device.
*/}}
{{- define "llm-cluster.rankPortCount" -}}
{{- add (. | int64) 2 -}}
{{- end -}}
