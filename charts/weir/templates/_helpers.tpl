{{/* SPDX-License-Identifier: Apache-2.0 */}}

{{- define "weir.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "weir.labels" -}}
app.kubernetes.io/part-of: weir
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{/* What agent and operator are selected by; never changes, as selectors are immutable. */}}
{{- define "weir.agent.selector" -}}
app.kubernetes.io/name: weir-agent
{{- end }}
{{- define "weir.operator.selector" -}}
app.kubernetes.io/name: weir-operator
{{- end }}

{{- define "weir.agent.config" -}}
routing: {{ .Values.routing }}
mtu: {{ .Values.mtu }}
uplinks: {{ toJson .Values.uplinks }}
xdp:
  mode: {{ .Values.xdp.mode | default "off" | quote }}
  services: {{ .Values.xdp.services }}
policy:
  audit: {{ .Values.policy.audit }}
masquerade: {{ .Values.masquerade.enabled }}
masqueradeExcludeCIDRs: {{ toJson .Values.masquerade.excludeCIDRs }}
apiServer: {{ .Values.apiServer | quote }}
kubeletKubeconfig: /host/kubelet.conf
cniConfName: {{ .Values.cni.confName }}
maps:
  conntrack: {{ .Values.maps.conntrack | int64 }}
  snat: {{ .Values.maps.snat | int64 }}
  sockNat: {{ .Values.maps.sockNat | int64 }}
  services: {{ .Values.maps.services | int64 }}
  backends: {{ .Values.maps.backends | int64 }}
  addresses: {{ .Values.maps.addresses | int64 }}
  policy: {{ .Values.maps.policy | int64 }}
  blocked: {{ .Values.maps.blocked | int64 }}
  endpoints: {{ .Values.maps.endpoints | int64 }}
  prefixes: {{ .Values.maps.prefixes | int64 }}
  routes: {{ .Values.maps.routes | int64 }}
  maglev: {{ .Values.maps.maglev | int64 }}
  affinity: {{ .Values.maps.affinity | int64 }}
  sourceRanges: {{ .Values.maps.sourceRanges | int64 }}
nodePortAddresses: {{ toJson .Values.nodePortAddresses }}
loadBalancer:
  algorithm: {{ .Values.loadBalancer.algorithm }}
  maglevTableSize: {{ .Values.loadBalancer.maglevTableSize | int64 }}
  mode: {{ .Values.loadBalancer.mode }}
metricsAddress: {{ .Values.agent.metricsAddress | quote }}
metricsPort: {{ .Values.agent.metricsPort }}
proxyHealthPort: {{ .Values.agent.proxyHealthPort }}
resyncSeconds: {{ .Values.agent.resyncSeconds }}
logLevel: {{ .Values.logLevel }}
{{- end }}

{{- define "weir.operator.config" -}}
apiServer: {{ .Values.apiServer | quote }}
kubeletKubeconfig: /host/kubelet.conf
listen: "[::]:{{ .Values.operator.port }}"
healthListen: 127.0.0.1:{{ .Values.operator.healthPort }}
{{- if .Values.operator.metricsPort }}
metricsListen: "[::]:{{ .Values.operator.metricsPort }}"
{{- end }}
loadBalancerClass: {{ .Values.loadBalancer.class | quote }}
classlessLoadBalancers: {{ .Values.loadBalancer.withoutClass }}
logLevel: {{ .Values.logLevel }}
{{- end }}

{{/* Schema of a label selector, as Kubernetes has it, with what it selects. */}}
{{- define "weir.labelSelectorSchema" -}}
type: object
description: Which {{ . }} get addresses from here; all, if it is not there.
x-kubernetes-map-type: atomic
properties:
  matchLabels:
    type: object
    additionalProperties:
      type: string
  matchExpressions:
    type: array
    x-kubernetes-list-type: atomic
    items:
      type: object
      required: [key, operator]
      properties:
        key:
          type: string
        operator:
          type: string
          enum: [In, NotIn, Exists, DoesNotExist]
        values:
          type: array
          x-kubernetes-list-type: atomic
          items:
            type: string
{{- end }}

{{/* Who and where a pod is. */}}
{{- define "weir.env" -}}
- name: NODE_NAME
  valueFrom:
    fieldRef:
      fieldPath: spec.nodeName
- name: POD_NAME
  valueFrom:
    fieldRef:
      fieldPath: metadata.name
- name: POD_NAMESPACE
  valueFrom:
    fieldRef:
      fieldPath: metadata.namespace
- name: HOST_IP
  valueFrom:
    fieldRef:
      fieldPath: status.hostIP
{{- end }}

{{/* Agent and operator ask the API server before any Service works, so they learn its address from
the kubelet's kubeconfig, unless a value gives it. */}}
{{- define "weir.kubeconfig.mount" -}}
{{- if not .Values.apiServer }}
- name: kubeconfig
  mountPath: /host/kubelet.conf
  readOnly: true
{{- end }}
{{- end }}
{{- define "weir.kubeconfig.volume" -}}
{{- if not .Values.apiServer }}
- name: kubeconfig
  hostPath:
    path: {{ .Values.kubelet.kubeconfig }}
    type: File
{{- end }}
{{- end }}
