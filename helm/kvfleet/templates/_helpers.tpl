{{/* Names. The prefix leaves room for the longest suffix (-operator) within the 63 characters of a label value. */}}
{{- define "kvfleet.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "kvfleet.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 54 | trimSuffix "-" -}}
{{- else -}}
{{- $name := include "kvfleet.name" . -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 54 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 54 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "kvfleet.operatorName" -}}
{{- printf "%s-operator" (include "kvfleet.fullname" .) -}}
{{- end -}}

{{/* Cluster-scoped objects carry the namespace too: releases of one name in two namespaces must not collide. */}}
{{- define "kvfleet.clusterName" -}}
{{- printf "%s-%s" (include "kvfleet.fullname" .) .Release.Namespace -}}
{{- end -}}

{{- define "kvfleet.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "kvfleet.operatorName" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "kvfleet.routerName" -}}
{{- default (include "kvfleet.fullname" .) .Values.router.name -}}
{{- end -}}

{{- define "kvfleet.routerNamespace" -}}
{{- $namespace := default .Release.Namespace .Values.router.namespace -}}
{{- if and .Values.watchNamespaces (not (has $namespace .Values.watchNamespaces)) -}}
{{- fail (printf "router.enabled: the FleetRouter's namespace %q is not in watchNamespaces %s, so no operator would serve it: add it there, or set router.namespace to one of them" $namespace (toJson .Values.watchNamespaces)) -}}
{{- end -}}
{{- $namespace -}}
{{- end -}}

{{/* Labels. Selector labels never change in the life of a release. */}}
{{- define "kvfleet.chartLabel" -}}
{{- printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "kvfleet.labels" -}}
{{- merge (include "kvfleet.ownLabels" . | fromYaml) .Values.commonLabels | toYaml -}}
{{- end -}}

{{- define "kvfleet.ownLabels" -}}
helm.sh/chart: {{ include "kvfleet.chartLabel" . }}
app.kubernetes.io/name: {{ include "kvfleet.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: kvfleet
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- define "kvfleet.operatorSelectorLabels" -}}
app.kubernetes.io/name: {{ include "kvfleet.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end -}}

{{/* Labels with a component; argument: list $ COMPONENT. */}}
{{- define "kvfleet.componentLabels" -}}
{{- merge (dict "app.kubernetes.io/component" (index . 1)) (include "kvfleet.labels" (index . 0) | fromYaml) | toYaml -}}
{{- end -}}

{{- define "kvfleet.image" -}}
{{- $image := .Values.image -}}
{{- $repository := ternary (printf "%s/%s" $image.registry $image.repository) $image.repository (ne $image.registry "") -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $repository $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $repository (default .Chart.AppVersion $image.tag) -}}
{{- end -}}
{{- end -}}

{{/* Pods of hooks: placed and secured as the operator's. */}}
{{- define "kvfleet.hookPod" -}}
restartPolicy: Never
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- range $field := list "nodeSelector" "tolerations" "affinity" }}
{{- with index $.Values.operator $field }}
{{ $field }}:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- with .Values.operator.podSecurityContext }}
securityContext:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "kvfleet.hookContainer" -}}
image: {{ include "kvfleet.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
{{- with .Values.operator.resources }}
resources:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.operator.securityContext }}
securityContext:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}
