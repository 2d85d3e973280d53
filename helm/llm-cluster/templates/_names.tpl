{{/* Names, labels, images. Part of a pod's name is the full name, so it has at most 30 characters. */}}

{{- define "llm-cluster.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 30 | trimAll "-" -}}
{{- end -}}

{{- define "llm-cluster.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if contains (include "llm-cluster.name" .) .Release.Name -}}
{{- .Release.Name | replace "." "-" | trunc 30 | trimAll "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "llm-cluster.name" .) | replace "." "-" | trunc 30 | trimAll "-" -}}
{{- end -}}
{{- end -}}

{{- define "llm-cluster.selectorLabels" -}}
app.kubernetes.io/name: {{ include "llm-cluster.name" .root | quote }}
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
{{- with .component }}
app.kubernetes.io/component: {{ . | quote }}
{{- end }}
{{- with .group }}
llm-cluster/worker-group: {{ . | quote }}
{{- end }}
{{- end -}}

{{/* The same as NAME=VALUE,... */}}
{{- define "llm-cluster.selectorText" -}}
{{- $pairs := list -}}
{{- range $name, $value := include "llm-cluster.selectorLabels" . | fromYaml -}}
{{- $pairs = append $pairs (printf "%s=%s" $name $value) -}}
{{- end -}}
{{- join "," $pairs -}}
{{- end -}}

{{- define "llm-cluster.labels" -}}
{{ include "llm-cluster.selectorLabels" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: llm-cluster
app.kubernetes.io/managed-by: {{ .root.Release.Service | quote }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" | quote }}
{{- end -}}

{{- define "llm-cluster.image" -}}
{{- $image := .root.Values.image -}}
{{- $name := printf "%s-%s" $image.repositoryPrefix .target -}}
{{- if $image.registry -}}{{- $name = printf "%s/%s" (trimSuffix "/" $image.registry) $name -}}{{- end -}}
{{- with get $image.digests .target -}}
{{- printf "%s@%s" $name . -}}
{{- else -}}
{{- printf "%s:%s" $name ($image.tag | default $.root.Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{- define "llm-cluster.serviceAccountName" -}}
{{- get .root.Values.serviceAccount.names .component | default (printf "%s-%s" (include "llm-cluster.fullname" .root) .component) -}}
{{- end -}}

{{- define "llm-cluster.clusterName" -}}
{{- .Values.clusterName | default (include "llm-cluster.fullname" .) -}}
{{- end -}}

{{- define "llm-cluster.controllerHost" -}}
{{- include "llm-cluster.fullname" . -}}-controller
{{- end -}}

{{- define "llm-cluster.tokenSecret" -}}
{{- .Values.auth.existingSecret | default (printf "%s-token" (include "llm-cluster.fullname" .)) -}}
{{- end -}}

{{/* What clients call a model. */}}
{{- define "llm-cluster.servedName" -}}
{{- .served_model_name | default (.model | trimSuffix "/" | splitList "/" | last) -}}
{{- end -}}

{{/* The models that have replicas, as a list. */}}
{{- define "llm-cluster.servedModels" -}}
{{- $served := list -}}
{{- range .Values.models -}}
{{- if not (and (hasKey . "replicas") (eq (int64 .replicas) 0)) -}}{{- $served = append $served . -}}{{- end -}}
{{- end -}}
{{- toJson $served -}}
{{- end -}}

{{/*
Versions of the API. The server says what it has; a client that renders without one knows its number only, and claims
every version of the API that there ever was.
*/}}
{{- define "llm-cluster.pdbVersion" -}}
{{- $has := and (.Capabilities.APIVersions.Has "policy/v1") (semverCompare ">=1.21.0-0" .Capabilities.KubeVersion.Version) -}}
{{- ternary "policy/v1" "policy/v1beta1" $has -}}
{{- end -}}

{{- define "llm-cluster.hpaVersion" -}}
{{- $has := and (.Capabilities.APIVersions.Has "autoscaling/v2") (semverCompare ">=1.23.0-0" .Capabilities.KubeVersion.Version) -}}
{{- ternary "autoscaling/v2" "autoscaling/v2beta2" $has -}}
{{- end -}}
