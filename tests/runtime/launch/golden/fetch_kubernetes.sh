# the run directory
mkdir -p runs/n.launch
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
kubectl create --filename=runs/n.launch/files.yaml
kubectl wait --for=condition=Ready pod/n-files --timeout=300s
rm -rf runs/n.new runs/n.old
mkdir -p runs/n.new runs/n
kubectl cp n-files:/runs/n runs/n.new
mv runs/n runs/n.old
mv runs/n.new runs/n
rm -rf runs/n.old
kubectl delete pod n-files --ignore-not-found --grace-period=1
