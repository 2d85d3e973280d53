{{/* What rendering refuses, each in one sentence that names the way out. */}}

{{- define "llm-cluster.check" -}}
{{- include "llm-cluster.checkNeeded" . -}}
{{- include "llm-cluster.checkAuth" . -}}
{{- include "llm-cluster.checkGroups" . -}}
{{- include "llm-cluster.checkVolume" . -}}
{{- include "llm-cluster.checkRestricted" . -}}
{{- if .Values.checks.modelPaths -}}{{- include "llm-cluster.checkPaths" . -}}{{- end -}}
{{- if .Values.checks.devices -}}{{- include "llm-cluster.checkDevices" . -}}{{- end -}}
{{- include "llm-cluster.checkNames" . -}}
{{- end -}}

{{/* A null takes a default away; what the templates cannot do without is listed by the generator of the values. */}}
{{- define "llm-cluster.checkNeeded" -}}
{{- $values := .Values -}}
{{- range $path := .Files.Get "files/needed.json" | fromJsonArray -}}
{{- $at := $values -}}
{{- range splitList "." $path -}}
{{- $at = index $at . -}}
{{- end -}}
{{- if kindIs "invalid" $at -}}
{{- printf "%s is null; leave it out to have its default, or give it a value." $path | fail -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* The restricted Pod Security Standard, for what users add to pods. */}}
{{- define "llm-cluster.checkRestricted" -}}
{{- $allowed := list "name" "configMap" "csi" "downwardAPI" "emptyDir" "ephemeral" "persistentVolumeClaim" "projected" "secret" -}}
{{- range $index, $volume := .Values.extraVolumes -}}
{{- range $kind, $_ := $volume -}}
{{- if not (or (has $kind $allowed) $.Values.modelVolume.hostPath.acknowledgeNotRestricted) -}}
{{- printf "extraVolumes[%d] is a %s, which the restricted Pod Security Standard forbids; use a persistentVolumeClaim, or say modelVolume.hostPath.acknowledgeNotRestricted: true." $index $kind | fail -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $pods := list .Values.controller .Values.router -}}
{{- range concat $pods (.Values.workers | default list) -}}
{{- range $name, $profile := .podAnnotations -}}
{{- if and (hasPrefix "container.apparmor.security.beta.kubernetes.io/" $name) (eq $profile "unconfined") -}}
{{- printf "podAnnotations say %s: unconfined, which the restricted Pod Security Standard forbids; name a profile, or leave it out." $name | fail -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "llm-cluster.checkAuth" -}}
{{- if and .Values.auth.existingSecret .Values.auth.token -}}
{{- fail "auth.existingSecret and auth.token are both set; keep one of them." -}}
{{- else if not (or .Values.auth.existingSecret .Values.auth.token) -}}
{{- fail "Ray's nodes need a token: name a Secret in auth.existingSecret, or set auth.token to at least 16 characters." -}}
{{- end -}}
{{- end -}}

{{- define "llm-cluster.checkGroups" -}}
{{- $names := list "controller" "router" "router-metrics" "token" "config" "test" -}}
{{- range $index, $group := .Values.workers -}}
{{- if has $group.name $names -}}
{{- printf "workers[%d].name: %s is taken already; give the group another name." $index $group.name | fail -}}
{{- end -}}
{{- $names = append $names $group.name -}}
{{- end -}}
{{- $router := .Values.router.autoscaling -}}
{{- $resources := .Values.router.resources -}}
{{- if and $router.enabled (not (or ($resources.requests | default dict).cpu ($resources.limits | default dict).cpu)) -}}
{{- fail "router.autoscaling goes by the CPU that routers request; set router.resources.requests.cpu." -}}
{{- end -}}
{{- if and $router.enabled (gt (int64 $router.minReplicas) (int64 $router.maxReplicas)) -}}
{{- fail "router.autoscaling.minReplicas is larger than maxReplicas; lower it." -}}
{{- end -}}
{{- $ports := splitList " " .Values.network.ephemeralPorts -}}
{{- $first := index $ports 0 | int64 -}}
{{- $last := index $ports 1 | int64 -}}
{{- if or (lt $first 1024) (ge $first $last) (gt $last 65535) -}}
{{- fail "network.ephemeralPorts are a first and a larger last port between 1024 and 65535; write them so." -}}
{{- end -}}
{{- $ranks := include "llm-cluster.rankPorts" . | fromJson -}}
{{- if or (ge (int64 $ranks.first) (int64 $ranks.last)) (gt (int64 $ranks.last) 65535) -}}
{{- fail "config.controller.rank_ports are a first and a larger last port up to 65535; write them so." -}}
{{- end -}}
{{- range list (list "config.controller.rank_ports" $ranks.first $ranks.last) (list "network.ephemeralPorts" $first $last) -}}
{{- if and (le (index . 1 | int64) 19999) (ge (index . 2 | int64) 6379) -}}
{{- printf "%s reaches into the ports up to 19999, which Ray's workers use; begin at 20000 or later." (index . 0) | fail -}}
{{- end -}}
{{- end -}}
{{- $engine := include "llm-cluster.lastEnginePort" . | int64 -}}
{{- range list (list "config.controller.rank_ports" $ranks.first $ranks.last) (list "network.ephemeralPorts" $first $last) -}}
{{- if and (le (index . 1 | int64) $engine) (ge (index . 2 | int64) 50051) -}}
{{- printf "%s reaches into the ports 50051 to %d, where controller, routers and leaders listen; move it." (index . 0) $engine | fail -}}
{{- end -}}
{{- end -}}
{{- if and (le $first (int64 $ranks.last)) (ge $last (int64 $ranks.first)) -}}
{{- fail "network.ephemeralPorts and config.controller.rank_ports overlap; move one of them." -}}
{{- end -}}
{{- end -}}

{{- define "llm-cluster.checkVolume" -}}
{{- $volume := .Values.modelVolume -}}
{{- if and (eq $volume.type "pvc") (not $volume.pvc.claimName) -}}
{{- fail "modelVolume.type is pvc; name the claim in modelVolume.pvc.claimName." -}}
{{- else if and (eq $volume.type "local") (not $volume.local.storageClass) -}}
{{- fail "modelVolume.type is local; name the class of the local volumes in modelVolume.local.storageClass." -}}
{{- else if eq $volume.type "hostPath" -}}
{{- if not $volume.hostPath.path -}}
{{- fail "modelVolume.type is hostPath; name the folder in modelVolume.hostPath.path." -}}
{{- else if not $volume.hostPath.acknowledgeNotRestricted -}}
{{- fail "A hostPath does not satisfy the restricted Pod Security Standard; say modelVolume.hostPath.acknowledgeNotRestricted: true, or take another modelVolume.type." -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "llm-cluster.checkPaths" -}}
{{- $volume := .Values.modelVolume -}}
{{- $own := not (empty .Values.extraVolumeMounts) -}}
{{- range $index, $model := .Values.models -}}
{{- $at := printf "models[%d].model is %s" $index $model.model -}}
{{- if eq $model.model "demo" -}}
{{- else if hasPrefix "/" $model.model -}}
{{- if and (has $volume.type (list "none" "hubCache")) (not $own) -}}
{{- printf "%s, and modelVolume.type %s holds no such folder; choose pvc, local or hostPath, or mount it with extraVolumes." $at $volume.type | fail -}}
{{- else if not (or $own (hasPrefix (printf "%s/" $volume.mountPath) (printf "%s/" $model.model))) -}}
{{- printf "%s, which is not below modelVolume.mountPath %s; change one of them." $at $volume.mountPath | fail -}}
{{- end -}}
{{- else if ne $volume.type "hubCache" -}}
{{- printf "%s, a model of the hub; set modelVolume.type hubCache, or give a folder that begins with /." $at | fail -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "llm-cluster.checkDevices" -}}
{{- $wanted := 0 -}}
{{- $total := 0 -}}
{{- $most := dict "auto" 0 "cuda" 0 "cpu" 0 -}}
{{- range (include "llm-cluster.workerGroups" . | fromJson).groups -}}
{{- $devices := int64 .devicesPerPod -}}
{{- $total = add $total (mul $devices (int64 .replicas)) -}}
{{- range $kind := list "auto" (ternary "cuda" "cpu" (eq .deviceKind "gpu")) -}}
{{- $_ := set $most $kind (max (get $most $kind | int64) $devices) -}}
{{- end -}}
{{- end -}}
{{- range $index, $model := .Values.models -}}
{{- $tensor := $model.tensor_parallel_size | default 1 | int64 -}}
{{- $replicas := ternary $model.replicas 1 (hasKey $model "replicas") | int64 -}}
{{- $kind := $model.device | default "auto" -}}
{{- $wanted = add $wanted (mul $replicas $tensor ($model.pipeline_parallel_size | default 1 | int64)) -}}
{{- if and (gt $replicas 0) (gt $tensor (get $most $kind | int64)) -}}
{{- printf "models[%d] wants %d devices%s in one pod (tensor_parallel_size), and no worker group has more than %d; raise devicesPerPod, or say checks.devices: false." $index $tensor (ternary "" (printf " of kind %s" $kind) (eq $kind "auto")) (get $most $kind | int64) | fail -}}
{{- end -}}
{{- end -}}
{{- if gt $wanted $total -}}
{{- printf "The models want %d devices (replicas * tensor_parallel_size * pipeline_parallel_size), and the worker groups have %d (replicas * devicesPerPod); raise workers[].replicas, or say checks.devices: false." $wanted $total | fail -}}
{{- end -}}
{{- end -}}

{{- define "llm-cluster.checkNames" -}}
{{- if not (regexMatch "^[a-z]" (include "llm-cluster.fullname" .)) -}}
{{- printf "Names of Services begin with a letter, and %s does not; set fullnameOverride." (include "llm-cluster.fullname" .) | fail -}}
{{- end -}}
{{- $names := list -}}
{{- range $index, $model := .Values.models -}}
{{- $name := include "llm-cluster.servedName" $model -}}
{{- if not (regexMatch "^[^\\s/#]{1,128}$" $name) -}}
{{- printf "models[%d] would be served as %q; give it a served_model_name of 1 to 128 characters without spaces, '/' and '#'." $index $name | fail -}}
{{- end -}}
{{- if has $name $names -}}
{{- printf "Two models are served as %s; give models[%d] a served_model_name." $name $index | fail -}}
{{- end -}}
{{- $names = append $names $name -}}
{{- end -}}
{{- end -}}
