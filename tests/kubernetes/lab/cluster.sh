#!/bin/bash
# A real one-node Kubernetes 1.20 in its own network namespace. usage: cluster.sh up|try IMAGE|dns|load TAR...|volumes N|down
#   IMAGES="a.tar b.tar" cluster.sh up    image archives (podman save) to load at the start; load adds more later
#   export KUBECONFIG=$(cluster.sh kubeconfig)
# No default route inside: nothing leaves the machine. cluster.sh dns: run it after Services were added.
LAB=${K8S_LAB:-$HOME/.cache/k8s-lab}; BIN=$LAB/bin; R=$LAB/run; NS=k8slab; NODE=10.99.0.2; HOST=10.99.0.1; CTR="ctr -a $R/containerd.sock -n k8s.io"
say(){ echo "$*" >&2; exit 1; }
stop(){ # NAME PROGRAM: end what was started under this name, if that is what its pid is now
  local pid; pid=$(cat "$R/$1.pid" 2>/dev/null) || return 0
  { tr '\0' ' ' < "/proc/$pid/cmdline" | grep -q "$2" && kill "$pid"; } 2>/dev/null
}
strays(){ # what is left of pods when containerd went first: their processes, and those that kept them
  cat $(find /sys/fs/cgroup -path '*/kubepods/*' -name cgroup.procs 2>/dev/null) /dev/null 2>/dev/null | sort -u
  grep -lz "^$R/containerd.sock$" /proc/[0-9]*/cmdline 2>/dev/null | cut -d/ -f3 | while read -r p; do
    [ "$p" = $$ ] || ! tr '\0' ' ' < "/proc/$p/cmdline" | grep -q containerd-shim || echo "$p"
  done 2>/dev/null
}
down(){
  if [ ! -e $R/netns.before ]; then rm -rf $R; return; fi   # nothing was begun, and what is there is somebody else's
  stop kubelet kubelet
  if [ -S $R/containerd.sock ]; then
    for t in $(timeout 30 $CTR tasks ls -q 2>/dev/null); do timeout 30 $CTR tasks kill -s 9 $t >/dev/null 2>&1; done; sleep 1
    for t in $(timeout 30 $CTR tasks ls -q 2>/dev/null); do timeout 30 $CTR tasks rm -f $t >/dev/null 2>&1; done
    for t in $(timeout 30 $CTR containers ls -q 2>/dev/null); do timeout 30 $CTR containers rm $t >/dev/null 2>&1; done
  fi
  stop proxy kube-proxy; stop containerd containerd; stop sched kube-scheduler; stop kcm kube-controller-manager
  stop apiserver kube-apiserver; stop etcd etcd; stop dns dnsmasq; sleep 1
  for p in $(strays); do kill -9 "$p" 2>/dev/null; done
  awk -v r=$R/ '$2 ~ "^"r {print $2}' /proc/mounts | sort -r | while read m; do umount -l "$m"; done
  for n in $(ip netns list | awk '/^cni-/{print $1}'); do grep -qx "$n" $R/netns.before || ip netns del $n; done
  ip link del labk0 2>/dev/null; ip netns del $NS 2>/dev/null
  for c in /sys/fs/cgroup/*/kubepods /sys/fs/cgroup/kubepods; do find $c -depth -type d -exec rmdir {} \; 2>/dev/null; done
  [ -f $R/sysctl.before ] && sysctl -q -p $R/sysctl.before
  # of the production overlay, on the node, which is this machine
  [ -e $R/without-cache ] && rm -rf --one-file-system /var/lib/modelops-cache
  rm -rf --one-file-system $R
}
up(){
[ ! -e /run/netns/$NS ] || say "there is a network namespace $NS already: one cluster at a time"
for c in /sys/fs/cgroup/kubepods* /sys/fs/cgroup/*/kubepods*; do [ ! -e $c ] || say "this machine is a node of a cluster already: $c"; done
set -e; mkdir -p $R/pki $R/etcd $R/cni $R/kubelet; cd $R
sysctl vm.overcommit_memory kernel.panic kernel.panic_on_oops kernel.keys.root_maxkeys kernel.keys.root_maxbytes > sysctl.before   # kubelet changes these
ip netns list | awk '{print $1}' > netns.before; [ -e /var/lib/modelops-cache ] || touch without-cache
ip netns add $NS; ip link add labk0 type veth peer name node0 netns $NS; ip addr add $HOST/24 dev labk0; ip link set labk0 up
N="nsenter --net=/run/netns/$NS"   # not `ip netns exec`: that hides /sys/fs/cgroup
$N ip link set lo up; $N ip addr add $NODE/24 dev node0; $N ip link set node0 up; $N ip route add 10.96.0.0/24 dev node0;   # no default route: nothing leaves this machine
 $N sysctl -qw net.ipv4.ip_forward=1 net.bridge.bridge-nf-call-iptables=1
openssl genrsa -out pki/sa.key 2048 2>/dev/null; openssl rsa -in pki/sa.key -pubout -out pki/sa.pub 2>/dev/null
openssl req -x509 -newkey rsa:2048 -nodes -keyout pki/ca.key -out pki/ca.crt -subj /CN=lab-ca -days 30 2>/dev/null
mk(){ openssl req -newkey rsa:2048 -nodes -keyout pki/$1.key -out pki/$1.csr -subj "$2" 2>/dev/null
 openssl x509 -req -in pki/$1.csr -CA pki/ca.crt -CAkey pki/ca.key -CAcreateserial -days 30 -out pki/$1.crt -extfile <(printf "subjectAltName=$3\nextendedKeyUsage=serverAuth,clientAuth\n") 2>/dev/null; }
mk apiserver /CN=kube-apiserver "DNS:localhost,DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,IP:127.0.0.1,IP:10.96.0.1,IP:$NODE"
mk admin "/O=system:masters/CN=admin" DNS:admin; mk kcm "/CN=system:kube-controller-manager" DNS:kcm; mk sched "/CN=system:kube-scheduler" DNS:sched
mk proxy "/CN=system:kube-proxy" DNS:proxy; mk kubelet "/O=system:nodes/CN=system:node:node1" DNS:node1
for u in admin kcm sched kubelet proxy; do cat > $u.kubeconfig <<K
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "https://$NODE:16443", certificate-authority: $R/pki/ca.crt}}]
users: [{name: u, user: {client-certificate: $R/pki/$u.crt, client-key: $R/pki/$u.key}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
current-context: x
K
done
bg(){ n=$1; shift; "$@" > $R/$n.log 2>&1 & echo $! > $R/$n.pid; }
bg etcd $N etcd --data-dir etcd --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 --listen-peer-urls http://127.0.0.1:2380 --initial-advertise-peer-urls http://127.0.0.1:2380 --initial-cluster default=http://127.0.0.1:2380 --unsafe-no-fsync
bg apiserver $N $BIN/kube-apiserver --etcd-servers=http://127.0.0.1:2379 --bind-address=$NODE --secure-port=16443 --advertise-address=$NODE --cert-dir=pki --tls-cert-file=pki/apiserver.crt --tls-private-key-file=pki/apiserver.key --client-ca-file=pki/ca.crt --service-account-key-file=pki/sa.pub --service-account-signing-key-file=pki/sa.key --service-account-issuer=https://kubernetes.default.svc --kubelet-client-certificate=pki/admin.crt --kubelet-client-key=pki/admin.key --kubelet-preferred-address-types=InternalIP --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction --allow-privileged=true --service-cluster-ip-range=10.96.0.0/24
cat > cni/10-lab.conflist <<J
{"cniVersion":"0.4.0","name":"lab","plugins":[
 {"type":"bridge","bridge":"cni0","isGateway":true,"ipMasq":true,"hairpinMode":true,"ipam":{"type":"host-local","ranges":[[{"subnet":"10.244.0.0/24"}]],"routes":[{"dst":"0.0.0.0/0"}],"dataDir":"$R/cni-ipam"}},
 {"type":"portmap","capabilities":{"portMappings":true}}]}
J
cat > containerd.toml <<T
version = 2
root = "$R/containerd/root"
state = "$R/containerd/state"
[grpc]
  address = "$R/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "$(cat $LAB/pause.name)"
  restrict_oom_score_adj = true   # no CAP_SYS_RESOURCE here
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "$R/cni"
T
bg containerd $N containerd -c containerd.toml
export KUBECONFIG=$R/admin.kubeconfig
for i in $(seq 1 240); do kubectl get --raw /readyz >/dev/null 2>&1 && break; sleep 0.5; done
kubectl get --raw /readyz >/dev/null || say "kube-apiserver does not answer: $(tail -n 3 apiserver.log)"
bg kcm $N $BIN/kube-controller-manager --kubeconfig=kcm.kubeconfig --bind-address=127.0.0.1 --port=0 --leader-elect=false --root-ca-file=pki/ca.crt --service-account-private-key-file=pki/sa.key --use-service-account-credentials=true --cluster-signing-cert-file=pki/ca.crt --cluster-signing-key-file=pki/ca.key --cluster-cidr=10.244.0.0/24 --pod-eviction-timeout=10s --node-monitor-grace-period=12s
bg sched $N $BIN/kube-scheduler --kubeconfig=sched.kubeconfig --bind-address=127.0.0.1 --port=0 --leader-elect=false
for i in $(seq 1 120); do $CTR version >/dev/null 2>&1 && break; sleep 0.5; done
$CTR version >/dev/null || say "containerd does not answer: $(tail -n 3 containerd.log)"
for t in $LAB/pause.tar ${IMAGES:-}; do $CTR images import $t; done
cat > kubelet.yaml <<Y
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: $R/pki/ca.crt}}
authorization: {mode: Webhook}
cgroupDriver: cgroupfs
failSwapOn: false
evictionHard: {memory.available: 100Mi, nodefs.available: "0%", imagefs.available: "0%", nodefs.inodesFree: "0%"}
oomScoreAdj: 0
nodeStatusUpdateFrequency: 4s
imageGCHighThresholdPercent: 100   # a disk that is nearly full is no reason to throw away what nobody can fetch again
clusterDNS: [10.96.0.10]
clusterDomain: cluster.local
volumePluginDir: $R/volplugins
Y
bg kubelet $N $BIN/kubelet --kubeconfig=kubelet.kubeconfig --config=kubelet.yaml --hostname-override=node1 --node-ip=$NODE --root-dir=$R/kubelet --cert-dir=$R/kubelet-pki --container-runtime=remote --container-runtime-endpoint=unix://$R/containerd.sock
bg proxy $N $BIN/kube-proxy --kubeconfig=proxy.kubeconfig --hostname-override=node1 --proxy-mode=iptables --cluster-cidr=10.244.0.0/24 --oom-score-adj=0 --conntrack-max-per-core=0 --conntrack-tcp-timeout-established=0s --conntrack-tcp-timeout-close-wait=0s
kubectl create clusterrolebinding kubelet-api --clusterrole=system:kubelet-api-admin --user=admin >/dev/null 2>&1 || true
for i in $(seq 1 240); do kubectl get node node1 2>/dev/null | grep -q ' Ready' && break; sleep 0.5; done
kubectl get node node1 | grep -q ' Ready' || say "the node is not ready: $(tail -n 3 kubelet.log)"
# cluster DNS: dnsmasq on the DNS cluster IP, fed from the services (re-run "k8s-cluster.sh dns" after applying)
$N ip addr add 10.96.0.10/32 dev lo; mkdir -p dns
kubectl get svc -A -o jsonpath='{range .items[*]}{.spec.clusterIP}{" "}{.metadata.name}{"."}{.metadata.namespace}{".svc.cluster.local\n"}{end}' | grep -v '^None' > dns/hosts
bg dns $N dnsmasq -k -i lo -a 10.96.0.10 -z --no-resolv --no-hosts --local=/cluster.local/ --hostsdir=$R/dns --user=root --pid-file=
kubectl get nodes -o wide
}
dns(){ export KUBECONFIG=$R/admin.kubeconfig; kubectl get svc -A -o jsonpath='{range .items[*]}{.spec.clusterIP}{" "}{.metadata.name}{"."}{.metadata.namespace}{".svc.cluster.local\n"}{end}' | grep -v '^None' > $R/dns/hosts.new && mv $R/dns/hosts.new $R/dns/hosts; kill -HUP $(cat $R/dns.pid); }
load(){ for t in "$@"; do $CTR images import "$t"; done; }
volumes(){ # so many, for claims: the node is this machine
export KUBECONFIG=$R/admin.kubeconfig
for i in $(seq 1 "$1"); do
  mkdir -p $R/volumes/$i; chmod 777 $R/volumes/$i
  cat <<V
---
apiVersion: v1
kind: PersistentVolume
metadata: {name: lab-$i}
spec:
  capacity: {storage: 20Gi}
  accessModes: [ReadWriteOnce]
  persistentVolumeReclaimPolicy: Retain
  hostPath: {path: $R/volumes/$i}
V
done | kubectl apply -f - >/dev/null
}
try(){ # whether a pod runs at all
export KUBECONFIG=$R/admin.kubeconfig
for i in $(seq 1 120); do kubectl get serviceaccount default >/dev/null 2>&1 && break; sleep 0.5; done
kubectl run try --image="$1" --image-pull-policy=Never --restart=Never --command -- /bin/true || return 1
for i in $(seq 1 240); do
  phase=$(kubectl get pod try -o 'jsonpath={.status.phase}'); [ "$phase" = Succeeded ] && break; sleep 0.5
done
[ "$phase" = Succeeded ] || say "a pod does not get beyond $phase: $(kubectl get events --field-selector involvedObject.name=try \
  -o 'jsonpath={range .items[*]}{.message}{"; "}{end}')"
kubectl delete pod try --wait=false >/dev/null
}
kubeconfig(){ echo $R/admin.kubeconfig; }
"$@"
