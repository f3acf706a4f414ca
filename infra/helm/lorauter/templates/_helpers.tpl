{{- define "lorauter.account" -}}
{{ .Values.serviceAccount.name | default .Release.Name }}
{{- end }}

{{- define "lorauter.image" -}}
{{- $of := index . 0 -}}{{- $kind := index . 1 -}}
{{- $tag := index $of.Values.image (printf "%sTag" $kind) | default (printf "%s-%s" $of.Chart.AppVersion $kind) -}}
{{ $of.Values.image.repository }}:{{ $tag }}
{{- end }}

{{- define "lorauter.container" -}}
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
{{- end }}

{{- define "lorauter.pod" -}}
serviceAccountName: {{ include "lorauter.account" . }}
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{ toJson . }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 1000
  runAsGroup: 1000
  fsGroup: 1000
  seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "lorauter.scheduling" -}}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "lorauter.env" -}}
{{- with .Values.image.pullPolicy }}
imagePullPolicy: {{ . }}
{{- end }}
{{- with .Values.env }}
env:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.envFrom }}
envFrom:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "lorauter.autoscaler" -}}
resources:
  {{- toYaml .Values.autoscaler.resources | nindent 2 }}
securityContext:
  {{- include "lorauter.container" . | nindent 2 }}
{{- end }}

{{- define "lorauter.keysFolder" -}}
{{ dir ((.Values.config.access | default dict).keys_file | default "/etc/lorauter/keys/keys.yaml") }}
{{- end }}

{{- define "lorauter.cacheFolder" -}}
{{- $folder := (.Values.config.cache | default dict).directory | default "default" -}}
{{ ternary "/home/ray/.cache/lorauter/adapters" $folder (eq $folder "default") }}
{{- end }}

{{- /* The settings of a batch: its own, and which models the service has. */}}
{{- define "lorauter.batch" -}}
{{- $settings := deepCopy .Values.batch.config }}
{{- range list "base_model" "base_model_aliases" "encoder" }}
{{- $value := index $.Values.config . }}
{{- if and $value (ne (toString $value) "default") }}
{{- $settings = merge $settings (dict . $value) }}
{{- end }}
{{- end }}
{{- if $settings }}{{ toYaml $settings }}{{ end }}
{{- end }}

{{- define "lorauter.keys" -}}
- name: keys
  secret: {secretName: {{ .Values.keysSecret }}}
{{- end }}
