{{- define "kvfleet.objectsName" -}}
{{- printf "%s-objects" (include "kvfleet.fullname" .) -}}
{{- end -}}

{{- define "kvfleet.objectsAccount" -}}
{{- ternary (include "kvfleet.objectsName" .) (include "kvfleet.serviceAccountName" .) .Values.serviceAccount.create -}}
{{- end -}}

{{/* Name → object. */}}
{{- define "kvfleet.objects" -}}
{{- $labels := include "kvfleet.labels" . | fromYaml -}}
{{- $objects := dict -}}
{{- if .Values.profiles.enabled -}}
{{- range $path, $_ := .Files.Glob "files/profiles/*.yaml" -}}
{{- $profile := $.Files.Get $path | fromYaml -}}
{{- $_ := set $objects (printf "acceleratorprofile-%s" $profile.metadata.name) (merge $profile (dict "metadata" (dict "labels" $labels))) -}}
{{- end -}}
{{- end -}}
{{- if .Values.router.enabled -}}
{{- $metadata := dict "name" (include "kvfleet.routerName" .) "namespace" (include "kvfleet.routerNamespace" .) "labels" $labels -}}
{{- $spec := merge (dict) .Values.router.spec (dict "image" (include "kvfleet.image" .)) -}}
{{- $_ := set $objects (printf "fleetrouter-%s" $metadata.name) (dict "apiVersion" "kvfleet.io/v1alpha1" "kind" "FleetRouter" "metadata" $metadata "spec" $spec) -}}
{{- end -}}
{{- toYaml $objects -}}
{{- end -}}
