# manifests and code
mkdir -p runs/n.launch
cat > runs/n.launch/jobset.yaml <<'END_OF_FILE'
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: n
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  network:
    enableDNSHostnames: true
  replicatedJobs:
  - name: workers
    replicas: 1
    template:
      spec:
        backoffLimit: 0
        completionMode: Indexed
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 120
            containers:
            - name: run
              image: registry/jmeta:1
              command:
              - sh
              - -c
              - cd "$$(mktemp -d)" && tar -xzf /runs/n.code.tar.gz || exit 1; if [ "$${JMETA_RESTART_ATTEMPT:-0}" -gt 0 ]; then set -- "$$@" --resume; fi; exec "$$@"
              - run
              - python
              - -u
              - -m
              - experiments.reviews
              - --preset
              - full
              - --out
              - /runs/n
              env:
              - name: JMETA_RESTART_ATTEMPT
                valueFrom:
                  fieldRef:
                    fieldPath: metadata.annotations['jobset.sigs.k8s.io/restart-attempt']
              resources:
                limits:
                  google.com/tpu: 4
              volumeMounts:
              - name: runs
                mountPath: /runs
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: tpu-v5-lite-podslice
              cloud.google.com/gke-tpu-topology: 4x4
              cloud.google.com/gke-spot: 'true'
            volumes:
            - name: runs
              persistentVolumeClaim:
                claimName: runs
            tolerations:
            - key: cloud.google.com/gke-spot
              operator: Equal
              value: 'true'
              effect: NoSchedule
        completions: 4
        parallelism: 4
  failurePolicy:
    maxRestarts: 10
END_OF_FILE
cat > runs/n.launch/files.yaml <<'END_OF_FILE'
apiVersion: v1
kind: Pod
metadata:
  name: n-files
spec:
  restartPolicy: Never
  activeDeadlineSeconds: 3600
  containers:
  - name: files
    image: registry/jmeta:1
    command:
    - sleep
    - '3600'
    volumeMounts:
    - name: runs
      mountPath: /runs
  volumes:
  - name: runs
    persistentVolumeClaim:
      claimName: runs
END_OF_FILE
git archive --format=tar.gz --output=runs/n.launch/code.tar.gz HEAD

# the code onto the claim
kubectl delete pod n-files --ignore-not-found --grace-period=1
kubectl create --filename=runs/n.launch/files.yaml
kubectl wait --for=condition=Ready pod/n-files --timeout=300s
kubectl exec n-files -- sh -c 'ls -A /runs/n | head -n 1'
kubectl cp runs/n.launch/code.tar.gz n-files:/runs/n.code.tar.gz
kubectl delete pod n-files --ignore-not-found --grace-period=1

# create it
kubectl create --filename=runs/n.launch/jobset.yaml

# every 15 s until it is Completed or Failed; the cluster restarts it at most 10 times
kubectl get jobset n --output=json
kubectl get pods --selector=jobset.sigs.k8s.io/jobset-name=n --output=json
kubectl logs --selector=jobset.sigs.k8s.io/jobset-name=n,batch.kubernetes.io/job-completion-index=0 --tail=-1 --timestamps

# at the end: the run directory
kubectl delete pod n-files --ignore-not-found --grace-period=1
kubectl create --filename=runs/n.launch/files.yaml
kubectl wait --for=condition=Ready pod/n-files --timeout=300s
rm -rf runs/n.new runs/n.old
mkdir -p runs/n.new runs/n
kubectl cp n-files:/runs/n runs/n.new
mv runs/n runs/n.old
mv runs/n.new runs/n
rm -rf runs/n.old
kubectl delete pod n-files --ignore-not-found --grace-period=1

# at the end, however it comes
kubectl delete jobset n --ignore-not-found
kubectl delete secret n-env --ignore-not-found
kubectl delete pod n-files --ignore-not-found --grace-period=1
