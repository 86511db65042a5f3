{{- define "perceiver.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "perceiver.fullname" -}}
{{- $name := include "perceiver.name" . }}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" }}
{{- else if contains $name .Release.Name }}
{{- .Release.Name | trunc 63 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 63 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "perceiver.instanceLabels" -}}
app.kubernetes.io/name: {{ include "perceiver.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "perceiver.labels" -}}
{{ include "perceiver.instanceLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- /* Those of the serving pods alone: the pod of `helm test` has another component. */}}
{{- define "perceiver.selectorLabels" -}}
{{ include "perceiver.instanceLabels" . }}
app.kubernetes.io/component: service
{{- end }}

{{- define "perceiver.testLabels" -}}
{{ include "perceiver.instanceLabels" . }}
app.kubernetes.io/component: test
{{- end }}

{{- define "perceiver.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- /* The ports of probes and Prometheus, as a map of name to number: one for each worker. Empty: the service's port. */}}
{{- define "perceiver.managementPorts" -}}
{{- if .Values.managementPort }}
{{- range $worker := until (int .Values.workers) }}
{{ if $worker }}management-{{ $worker }}{{ else }}management{{ end }}: {{ add $.Values.managementPort $worker }}
{{- end }}
{{- end }}
{{- end }}

{{- define "perceiver.managementPortName" -}}
{{ if .Values.managementPort }}management{{ else }}http{{ end }}
{{- end }}

{{- /* The Service behind which Prometheus finds the pods. */}}
{{- define "perceiver.monitoredService" -}}
{{- $name := include "perceiver.fullname" . }}
{{- if .Values.managementPort }}{{ $name | trunc 52 | trimSuffix "-" }}-management{{ else }}{{ $name }}{{ end }}
{{- end }}

{{- /* What autoscaling reads. Explanations take what others leave, so they ask for no pods. The alarms and the dashboard
       come whole from files/. */}}
{{- define "perceiver.queueQuery" -}}
{{- $pods := printf "{namespace=%q, service=%q}" .Release.Namespace (include "perceiver.monitoredService" .) }}
{{- $window := .Values.autoscaling.queue.window }}
{{- $taken := printf "sum by (pod) (avg_over_time(perceiver_admitted_images%s[%s]))" $pods $window }}
{{- $background := printf "sum by (pod) (avg_over_time(perceiver_admitted_background_images%s[%s]))" $pods $window }}
{{- $all := printf "sum by (pod) (perceiver_max_queue_size%s)" $pods }}
{{- printf "sum((%s - %s) / %s)" $taken $background $all }}
{{- end }}

{{- /* A setting as text. YAML's numbers come as floats, which would print 268435456 as 2.68435456e+08. */}}
{{- define "perceiver.text" -}}
{{- if kindIs "slice" . }}
{{- $items := list }}
{{- range . }}{{ $items = append $items (include "perceiver.text" .) }}{{ end }}
{{- join "," $items }}
{{- else if and (kindIs "float64" .) (eq (floor .) .) }}
{{- int64 . }}
{{- else }}
{{- . }}
{{- end }}
{{- end }}

{{- /* PERCEIVER_ variables: what other values say, and `settings` over that. */}}
{{- define "perceiver.env" -}}
{{- $set := dict "port" 8000
      "model_dir" (printf "/models/%s" .Values.model.folder | trimSuffix "/")
      "drain_delay_s" .Values.drain.delaySeconds "drain_timeout_s" .Values.drain.timeoutSeconds }}
{{- with .Values.model.version }}{{ $_ := set $set "model_version" . }}{{ end }}
{{- if ne (toString .Values.workers) "1" }}{{ $_ := set $set "workers" .Values.workers }}{{ end }}
{{- with .Values.managementPort }}{{ $_ := set $set "management_port" . }}{{ end }}
{{- if .Values.gpu.enabled }}
{{- $_ := set $set "provider" "cuda" }}
{{- $_ := set $set "device_ids" (until (int .Values.gpu.count)) }}
{{- else }}
{{- $_ := set $set "provider" "cpu" }}
{{- end }}
{{- with .Values.keys.secretName }}
{{- $_ := set $set "api_keys_file" (printf "/etc/perceiver/keys/%s" $.Values.keys.apiKeys) }}
{{- with $.Values.keys.adminKey }}{{ $_ := set $set "admin_key_file" (printf "/etc/perceiver/keys/%s" .) }}{{ end }}
{{- end }}
{{- $set = mergeOverwrite $set (deepCopy .Values.settings) }}
{{- range $name := keys $set | sortAlpha }}
- name: PERCEIVER_{{ upper $name }}
  value: {{ include "perceiver.text" (index $set $name) | quote }}
{{- end }}
{{- end }}

{{- define "perceiver.probe" -}}
httpGet: {path: {{ .path }}, port: {{ include "perceiver.managementPortName" .root }}}
{{ toYaml (index .root.Values.probes .name) }}
{{- end }}

{{- /* What values.schema.json can't say: values that belong together. */}}
{{- define "perceiver.check" -}}
{{- if and (eq .Values.model.source "pvc") (not .Values.model.pvc.claimName) }}
{{- fail "model.source is pvc, so model.pvc.claimName must name a PersistentVolumeClaim" }}
{{- end }}
{{- if eq .Values.model.source "ociImage" }}
{{- if not .Values.model.ociImage.reference }}
{{- fail "model.source is ociImage, so model.ociImage.reference must name an image" }}
{{- end }}
{{- if semverCompare "<1.33-0" .Capabilities.KubeVersion.Version }}
{{- fail (printf "model.source is ociImage, which needs Kubernetes 1.33 or newer; this is %s" .Capabilities.KubeVersion.Version) }}
{{- end }}
{{- end }}
{{- if and (eq .Values.autoscaling.by "queue") (not .Values.autoscaling.queue.serverAddress) }}
{{- fail "autoscaling.by is queue, so autoscaling.queue.serverAddress must be the URL of Prometheus" }}
{{- end }}
{{- if and (eq .Values.autoscaling.by "cpu") (not (dig "requests" "cpu" "" .Values.resources)) (not (dig "limits" "cpu" "" .Values.resources)) }}
{{- fail "autoscaling.by is cpu, which is a percentage of resources.requests.cpu: set that" }}
{{- end }}
{{- if gt (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas) }}
{{- fail "autoscaling.minReplicas is larger than autoscaling.maxReplicas" }}
{{- end }}
{{- if .Values.managementPort }}
{{- if eq (toString .Values.workers) "auto" }}
{{- fail "workers is auto, so nobody knows how many ports there are from managementPort on: give workers a number" }}
{{- end }}
{{- $taken := values (include "perceiver.managementPorts" . | fromYaml) | toStrings }}
{{- range list "8000" (toString .Values.service.port) }}
{{- if has . $taken }}
{{- fail (printf "port %s, which clients use, is among those that workers take from managementPort on: name another" .) }}
{{- end }}
{{- end }}
{{- else if and (ne (toString .Values.workers) "1") (or .Values.serviceMonitor.enabled (eq .Values.autoscaling.by "queue")) }}
{{- fail "several workers have metrics of their own, which only management ports tell apart: set managementPort" }}
{{- end }}
{{- end }}
