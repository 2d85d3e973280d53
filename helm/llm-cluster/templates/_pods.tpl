{{/* What pods have in common. All satisfy the restricted Pod Security Standard. */}}

{{- define "llm-cluster.podSpec" -}}
serviceAccountName: {{ include "llm-cluster.serviceAccountName" (dict "root" .root "component" .account) | quote }}
automountServiceAccountToken: {{ .token | default false }}
# A Service of a release called llm-cluster would put LLM_CLUSTER_ variables here, which are settings.
enableServiceLinks: false
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
  {{- if .sysctls }}
  sysctls:
    - name: net.ipv4.ip_local_port_range
      value: {{ .root.Values.network.ephemeralPorts | quote }}
  {{- end }}
{{- with .settings }}
{{- range $name := list "nodeSelector" "tolerations" "topologySpreadConstraints" "priorityClassName" "runtimeClassName" }}
{{- with get $.settings $name }}
{{ $name }}:
  {{- if kindIs "string" . }} {{ . | quote }}{{ else }}{{ toYaml . | nindent 2 }}{{ end }}
{{- end }}
{{- end }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "llm-cluster.podMeta" -}}
labels:
  {{- include "llm-cluster.selectorLabels" . | nindent 2 }}
  app.kubernetes.io/part-of: llm-cluster
  {{- with omit (.settings.podLabels | default dict) "app.kubernetes.io/name" "app.kubernetes.io/instance" "app.kubernetes.io/component" "app.kubernetes.io/part-of" "llm-cluster/worker-group" }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with merge .checksums (.settings.podAnnotations | default dict) }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* A change of the token restarts what uses it. */}}
{{- define "llm-cluster.tokenChecksum" -}}
{{- $auth := .Values.auth -}}
{{- $of := list .Release.Namespace .Release.Name ($auth.existingSecret | default "") $auth.key ($auth.token | default "") -}}
{{- toJson $of | sha256sum -}}
{{- end -}}

{{- define "llm-cluster.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  runAsNonRoot: true
  capabilities:
    drop: [ALL]
  seccompProfile:
    type: RuntimeDefault
{{- end -}}

{{/* The image's entrypoint is `tini -- llm-cluster`: somebody has to reap what Ray leaves behind. Pods give arguments only. */}}
{{- define "llm-cluster.image-lines" -}}
image: {{ include "llm-cluster.image" . | quote }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
# Our errors are one sentence: the pod's status tells it.
terminationMessagePolicy: FallbackToLogsOnError
{{- end -}}

{{/* Requests and limits. Quantities become text: a server-side apply takes no numbers for them. */}}
{{- define "llm-cluster.resources" -}}
{{- $all := dict -}}
{{- range $part := list "requests" "limits" -}}
{{- $quantities := dict -}}
{{- range $name, $quantity := get $ $part -}}
{{- $_ := set $quantities $name (ternary $quantity (toJson $quantity) (kindIs "string" $quantity)) -}}
{{- end -}}
{{- with $quantities -}}{{- $_ := set $all $part . -}}{{- end -}}
{{- end -}}
{{- toYaml $all -}}
{{- end -}}

{{- define "llm-cluster.env" -}}
- name: POD_IP
  valueFrom:
    fieldRef:
      fieldPath: status.podIP
- name: HOME
  value: /tmp
{{- end -}}

{{/*
A container's variables: those of the chart ("chart", as YAML), then extraEnv, then the component's own. Of a name that comes
twice the last one holds: Kubernetes does not want a name twice.
*/}}
{{- define "llm-cluster.environment" -}}
{{- $user := concat (.root.Values.extraEnv | default list) (.settings.env | default list) -}}
{{- $all := concat (.chart | fromYamlArray) $user -}}
{{- $kept := list -}}
{{- range $index, $variable := $all -}}
{{- $later := false -}}
{{- range slice $all (add $index 1 | int) -}}
{{- if eq .name $variable.name -}}{{- $later = true -}}{{- end -}}
{{- end -}}
{{- if not $later -}}{{- $kept = append $kept $variable -}}{{- end -}}
{{- end -}}
{{- toYaml $kept -}}
{{- end -}}

{{/* For the pods that read models. */}}
{{- define "llm-cluster.hubEnv" -}}
- name: HF_HUB_DISABLE_TELEMETRY
  value: "1"
{{- if eq .Values.modelVolume.type "hubCache" }}
- name: HF_HOME
  value: {{ .Values.modelVolume.mountPath | quote }}
{{- with .Values.hub.endpoint }}
- name: HF_ENDPOINT
  value: {{ . | quote }}
{{- end }}
{{- with .Values.hub.tokenSecret }}
{{- if .name }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ .name | quote }}
      key: {{ .key | quote }}
{{- end }}
{{- end }}
{{- else }}
- name: HF_HUB_OFFLINE
  value: "1"
{{- end }}
{{- end -}}

{{- define "llm-cluster.interfaceEnv" -}}
{{- $network := .Values.network -}}
{{- if $network.interface -}}
{{- range list "NCCL_SOCKET_IFNAME" "GLOO_SOCKET_IFNAME" "TP_SOCKET_IFNAME" }}
- name: {{ . }}
  value: {{ $network.interface | quote }}
{{- end }}
{{- end }}
{{- with $network.ncclDebug }}
- name: NCCL_DEBUG
  value: {{ . }}
{{- end }}
{{- end -}}

{{- define "llm-cluster.volumes" -}}
{{- if .claim }}
- name: run
  persistentVolumeClaim:
    claimName: {{ .claim | quote }}
{{- else if not .persistent }}
- name: run
  emptyDir: {}
{{- end }}
- name: tmp
  emptyDir: {}
{{- if .shm }}
- name: shm
  emptyDir:
    medium: Memory
    sizeLimit: {{ .shm | quote }}
{{- end }}
{{- if .config }}
- name: config
  configMap:
    name: {{ include "llm-cluster.fullname" .root }}-config
{{- end }}
{{- if .shm }}
- name: token
  secret:
    secretName: {{ include "llm-cluster.tokenSecret" .root | quote }}
    defaultMode: 0440
    items:
      - key: {{ .root.Values.auth.key | quote }}
        path: token
{{- $models := .root.Values.modelVolume }}
{{- if eq $models.type "pvc" }}
- name: models
  persistentVolumeClaim:
    claimName: {{ $models.pvc.claimName | quote }}
    readOnly: true
{{- else if eq $models.type "hostPath" }}
- name: models
  hostPath:
    path: {{ $models.hostPath.path | quote }}
    type: Directory
{{- end }}
{{- end }}
{{- with .root.Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "llm-cluster.mounts" -}}
- name: run
  mountPath: /var/lib/llm-cluster
- name: tmp
  mountPath: /tmp
{{- if .shm }}
- name: shm
  mountPath: /dev/shm
{{- end }}
{{- if .config }}
- name: config
  mountPath: /etc/llm-cluster
  readOnly: true
{{- end }}
{{- if .shm }}
- name: token
  mountPath: /var/run/secrets/llm-cluster
  readOnly: true
{{- $models := .root.Values.modelVolume }}
{{- if ne $models.type "none" }}
- name: models
  mountPath: {{ $models.mountPath | quote }}
  {{- if ne $models.type "hubCache" }}
  readOnly: true
  {{- end }}
  {{- if eq $models.type "pvc" }}
  {{- with $models.pvc.subPath }}
  subPath: {{ . | quote }}
  {{- end }}
  {{- end }}
{{- end }}
{{- end }}
{{- with .root.Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "llm-cluster.claim" -}}
- metadata:
    name: {{ .name }}
    labels:
      {{- include "llm-cluster.selectorLabels" . | nindent 6 }}
  spec:
    accessModes: [ReadWriteOnce]
    {{- with .storageClass }}
    storageClassName: {{ . | quote }}
    {{- end }}
    resources:
      requests:
        storage: {{ .size | quote }}
{{- end -}}

{{/* The claim for models of each pod, for the types that have one. */}}
{{- define "llm-cluster.modelClaim" -}}
{{- $models := .root.Values.modelVolume -}}
{{- if has $models.type (list "local" "hubCache") -}}
{{- $claim := get $models $models.type -}}
{{- if eq .component "controller" -}}{{- $claim = merge (dict "size" ($claim.controllerSize | default $claim.size)) $claim -}}{{- end -}}
{{- include "llm-cluster.claim" (merge (dict "name" "models") (pick . "root" "component" "group") $claim) -}}
{{- end -}}
{{- end -}}

{{/* A group's affinity; with a hub cache at most one worker pod of the release on a node, so that nothing is fetched twice. */}}
{{- define "llm-cluster.workerAffinity" -}}
{{- $affinity := deepCopy .settings.affinity -}}
{{- if eq .root.Values.modelVolume.type "hubCache" -}}
{{- $labels := include "llm-cluster.selectorLabels" (dict "root" .root "component" "worker") | fromYaml -}}
{{- $term := dict "topologyKey" "kubernetes.io/hostname" "labelSelector" (dict "matchLabels" $labels) -}}
{{- $anti := get $affinity "podAntiAffinity" | default dict -}}
{{- $kind := "requiredDuringSchedulingIgnoredDuringExecution" -}}
{{- $_ := set $anti $kind (append (get $anti $kind | default list) $term) -}}
{{- $_ := set $affinity "podAntiAffinity" $anti -}}
{{- end -}}
{{- toJson $affinity -}}
{{- end -}}

{{- define "llm-cluster.httpGet" -}}
httpGet:
  path: {{ . }}
  port: metrics
{{- end -}}
